import { readdirSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(import.meta.url);

// The npm compiler: no download.
const solc = { version: "0.8.37", path: require.resolve("solc/soljson.js") };
const production = {
  ...solc,
  settings: {
    optimizer: { enabled: true, runs: 999999 },
    viaIR: true,
    evmVersion: "cancun",
    outputSelection: { "*": { "*": ["storageLayout"] } },
  },
};
// The Court is the one large contract; called seldom, it is compiled for size.
const optimizer = { enabled: true, runs: 200 };
// scripts/mutate builds a hundred times, and measures no gas.
const viaIR = !process.env.TALLYSTICK_QUICK_BUILD;
const small = { ...production, settings: { ...production.settings, optimizer, viaIR } };
// The tests run the contracts' production artifacts; they themselves are compiled quickly.
const fast = { ...solc, settings: { optimizer: { enabled: false }, evmVersion: "cancun" } };
const tests = readdirSync(new URL("contracts/test", import.meta.url)).filter((name) => name.endsWith(".t.sol"));

// At night: more runs of everything that is fuzzed.
const factor = Number(process.env.TALLYSTICK_FUZZ_FACTOR ?? 1);

export default {
  solidity: {
    compilers: [viaIR ? production : small],
    overrides: {
      "contracts/Court.sol": small,
      ...Object.fromEntries(tests.map((name) => [`contracts/test/${name}`, fast])),
    },
  },
  test: {
    solidity: {
      fsPermissions: {
        readFile: ["tests/vectors/eip712.json", "contracts/parameters.json"],
        readDirectory: ["artifacts/contracts"],
      },
      fuzz: { runs: 256 * factor, seed: process.env.TALLYSTICK_FUZZ_SEED },
      invariant: { runs: 64 * factor, depth: 64, failOnRevert: true },
    },
  },
};
