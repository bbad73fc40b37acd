// Deploys the contracts to any JSON-RPC and writes the address book that nodes and clients read.
//
//   node scripts/deploy.js --rpc URL [--out deployments/<chainId>.json] [--key-env NAME] [--treasury ADDRESS] [--proposer ADDRESS] [--scale N]
//
// --proposer may announce what the timelock carries out (default: the deployer; on a public chain name a multisig).
// Without --key-env, account 0 of a development node signs. --treasury gets the genesis supply (default: the deployer).
// --scale N divides every delay (seconds and blocks) and the epoch by N, for test networks.
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import {
  Contract,
  ContractFactory,
  FetchRequest,
  HDNodeWallet,
  JsonRpcProvider,
  Network,
  Wallet,
  formatEther,
  getCreateAddress,
  isAddress,
  keccak256,
} from "ethers";

const ROOT = join(dirname(fileURLToPath(import.meta.url)), "..");
const USAGE =
  "usage: node scripts/deploy.js --rpc URL [--out FILE] [--key-env NAME] [--treasury ADDRESS] [--proposer ADDRESS] [--scale N]";
const BUILD = "node node_modules/hardhat/dist/src/cli.js build";
const DEV_CHAINS = [31337n, 1337n];
const DEV_MNEMONIC = "test test test test test test test test test test test junk"; // everybody's: anvil, Hardhat
const ABI_VERSION = 3;
const DELAYS = ["UNBONDING", "STALE", "NOTICE", "EXIT_DELAY", "EPOCH", "EVIDENCE", "COMMIT", "REVEAL", "APPEAL", "RELAPSE", "LOOKAHEAD"];
const NAMES = JSON.parse(readFileSync(join(ROOT, "contracts", "names.json"), "utf8")); // in the order of deployment

/** A failure the person at the keyboard can mend: its message is all they see. */
class Failure extends Error {}

function options() {
  const text = { type: "string" };
  let values;
  try {
    values = parseArgs({
      options: { rpc: text, out: text, "key-env": text, treasury: text, proposer: text, scale: { type: "string", default: "1" } },
    }).values;
  } catch (error) {
    throw new Failure(`${error.message}; ${USAGE}`);
  }
  if (!values.rpc) throw new Failure(`--rpc is missing; ${USAGE}`);
  if (!/^[1-9]\d{0,6}$/.test(values.scale)) throw new Failure(`--scale must be a whole number from 1 up, not ${values.scale}.`);
  for (const name of ["treasury", "proposer"]) {
    if (values[name] && !isAddress(values[name])) throw new Failure(`--${name} is not an address: ${values[name]}.`);
  }
  return values;
}

function artifact(name) {
  const path = join(ROOT, "artifacts", "contracts", `${name}.sol`, `${name}.json`);
  if (!existsSync(path)) throw new Failure(`The contracts are not built (no ${path}); run: ${BUILD}`);
  return JSON.parse(readFileSync(path, "utf8"));
}

/** The production parameters, delays divided by `scale`. */
function parameters(scale) {
  const all = JSON.parse(readFileSync(join(ROOT, "contracts", "parameters.json"), "utf8"));
  const scaled = (seconds) => Math.max(1, Math.floor(seconds / scale));
  for (const name of DELAYS) all[name] = scaled(all[name]);
  // What the Court's constructor asks for; rounding breaks it when an epoch is a second long.
  const trial = 3 * (all.COMMIT + all.REVEAL) + 2 * all.APPEAL;
  if (trial > 5 * all.EPOCH || all.EVIDENCE + trial > all.UNBONDING) {
    throw new Failure(`--scale ${scale} leaves no time for a trial; name a smaller one.`);
  }
  return all;
}

/** Asks once before ethers does: its provider would retry a dead address forever. */
async function connect(url) {
  try {
    const response = await fetch(url, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ jsonrpc: "2.0", id: 1, method: "eth_chainId", params: [] }),
      signal: AbortSignal.timeout(10_000),
    });
    const chainId = BigInt((await response.json()).result);
    const request = new FetchRequest(url);
    request.timeout = 20_000;
    const provider = new JsonRpcProvider(request, chainId, { staticNetwork: Network.from(chainId), cacheTimeout: -1 });
    provider.pollingInterval = 200;
    return { provider, chainId };
  } catch (error) {
    const cause = error.cause?.code ?? error.message;
    throw new Failure(`No Ethereum JSON-RPC answers at ${url} (${cause}); for a local chain run: node_modules/.bin/anvil`);
  }
}

async function deployer(provider, chainId, keyEnv) {
  let signer;
  if (keyEnv) {
    const key = process.env[keyEnv];
    if (!key) throw new Failure(`The environment variable ${keyEnv} is empty; put the deployer's private key there.`);
    try {
      signer = new Wallet(key.trim(), provider);
    } catch {
      throw new Failure(`The environment variable ${keyEnv} holds no private key (32 bytes in hex).`);
    }
  } else {
    const [account] = await provider.send("eth_accounts", []).catch(() => []);
    if (!account) throw new Failure("This RPC has no unlocked account; name a private key with --key-env NAME.");
    signer = await provider.getSigner(account);
  }
  const dev = DEV_CHAINS.includes(chainId) ? [] : [...Array(20).keys()].map(devAddress);
  if (dev.includes(signer.address)) {
    throw new Failure(`${signer.address} is a development key that everybody knows; chain ${chainId} needs one of your own.`);
  }
  return signer;
}

function devAddress(index) {
  return HDNodeWallet.fromPhrase(DEV_MNEMONIC, undefined, `m/44'/60'/0'/0/${index}`).address;
}

/** What to deploy, in order: [name, constructor arguments], with the addresses the deployer's next nonces give. */
function plan(from, nonce, treasury, proposer, p) {
  const at = Object.fromEntries(NAMES.map((name, i) => [name, getCreateAddress({ from, nonce: nonce + i })]));
  const terms = [p.EVIDENCE, p.COMMIT, p.REVEAL, p.APPEAL, p.RELAPSE, p.LOOKAHEAD, p.HEADERS, p.MIN_UNITS];
  // Token and Staking name contracts that come later: the one that mints, the one that slashes.
  const args = {
    Token: [at.Emissions, treasury, p.GENESIS],
    Models: [],
    Staking: [at.Token, at.Models, at.Court, p.MIN_STAKE, p.UNBONDING, p.EPOCH, p.STALE],
    Escrow: [at.Staking, p.FEE_BPS, p.EXIT_DELAY],
    Beacon: [],
    Timelock: [at.Court, p.NOTICE, [proposer]],
    Court: [at.Staking, at.Beacon, at.Timelock, terms],
    Emissions: [at.Escrow, p.GAMMA_BPS, p.BUDGET, p.HALVING],
  };
  return NAMES.map((name) => {
    const { abi, bytecode } = artifact(name);
    // An upper bound instead of an estimate: a constructor that reads a contract of this plan has nothing to read yet.
    const gasLimit = 700_000n + 250n * BigInt(bytecode.length / 2);
    return { name, address: at[name], args: args[name], factory: new ContractFactory(abi, bytecode), gasLimit };
  });
}

async function checkFunds(provider, from, steps) {
  const { maxFeePerGas, gasPrice } = await provider.getFeeData();
  const need = steps.reduce((sum, step) => sum + step.gasLimit, 0n) * (maxFeePerGas ?? gasPrice ?? 0n);
  const have = await provider.getBalance(from);
  if (have < need) {
    throw new Failure(`${from} has ${formatEther(have)} ETH, the deployment may cost ${formatEther(need)}; send it some gas money.`);
  }
}

/** All transactions at once, then their receipts: a chain with slow blocks needs only one. */
async function deploy(signer, steps, nonce) {
  const sent = [];
  for (const [i, { factory, args, gasLimit }] of steps.entries()) {
    const transaction = await factory.getDeployTransaction(...args);
    sent.push(await signer.sendTransaction({ ...transaction, gasLimit, nonce: nonce + i }));
  }
  const contracts = {};
  for (const [i, { name, address }] of steps.entries()) {
    const receipt = await sent[i].wait(1, 180_000);
    if (receipt.contractAddress !== address) {
      throw new Failure(`${name} landed at ${receipt.contractAddress} instead of ${address}: another transaction of ${signer.address} came between; run this again.`);
    }
    const code = await signer.provider.getCode(address);
    contracts[name] = { address, deployBlock: receipt.blockNumber, bytecodeHash: keccak256(code), abiVersion: ABI_VERSION };
  }
  return contracts;
}

/** The cycle is closed: who may mint, slash and govern are the contracts that were deployed. */
async function checkAuthorities(provider, contracts) {
  const read = (name, getter) => new Contract(contracts[name].address, artifact(name).abi, provider)[getter]();
  for (const [name, getter, expected] of [["Token", "MINTER", "Emissions"], ["Staking", "SLASHER", "Court"], ["Court", "GOVERNOR", "Timelock"], ["Timelock", "COURT", "Court"]]) {
    const found = await read(name, getter);
    if (found !== contracts[expected].address) throw new Failure(`${name}.${getter} is ${found}, not ${expected}; deploy again.`);
  }
}

async function main() {
  const { rpc, out, treasury, proposer, scale, "key-env": keyEnv } = options();
  const { provider, chainId } = await connect(rpc);
  const file = out ?? join(ROOT, "deployments", `${chainId}.json`);
  if (existsSync(file) && !DEV_CHAINS.includes(chainId)) {
    throw new Failure(`${file} exists already; move it away first, or name another file with --out.`);
  }
  const signer = await deployer(provider, chainId, keyEnv);
  const nonce = await provider.getTransactionCount(signer.address, "pending");
  const steps = plan(signer.address, nonce, treasury ?? signer.address, proposer ?? signer.address, parameters(Number(scale)));
  await checkFunds(provider, signer.address, steps);
  const contracts = await deploy(signer, steps, nonce);
  await checkAuthorities(provider, contracts);
  const genesis = (await provider.getBlock(0)).hash;
  const book = { chainId: Number(chainId), genesis, blockTag: "safe", contracts };
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, `${JSON.stringify(book, null, 2)}\n`);
  console.log(`deployed to chain ${chainId}; the address book is ${file}`);
  provider.destroy();
}

main().catch((error) => {
  // ethers' messages go on for lines; its shortMessage says it in one. A bug keeps its stack.
  if (!(error instanceof Failure) && !error.shortMessage) throw error;
  console.error(`deploy: ${error.shortMessage ?? error.message}`);
  process.exit(1);
});
