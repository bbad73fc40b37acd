// Writes tests/vectors/eip712.json, which the Solidity and the Python tests read; --check only tells whether it is current.
//   node contracts/test/vectors.js [--check]
// ethers computes the digests, Vectors.t.sol holds the contracts to them. Integers are decimal strings.
import { readFileSync, writeFileSync } from "node:fs";
import { AbiCoder, SigningKey, TypedDataEncoder, Wallet, concat, id, keccak256, sha256, toBeHex, toUtf8Bytes } from "ethers";

const FILE = new URL("../../tests/vectors/eip712.json", import.meta.url);
const ORDER = 0xfffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141n;
const CHAIN = 31337;

const address = (byte) => `0x${byte.repeat(20)}`;
const word = (text) => sha256(toUtf8Bytes(text));
const key = (text) => new SigningKey(id(text));
const signerOf = (text) => new Wallet(key(text)).address;

const domain = (name, verifyingContract) => {
  const fields = { name, version: "1", chainId: CHAIN, verifyingContract };
  return { ...fields, separator: TypedDataEncoder.hashDomain(fields) };
};
const domains = {
  escrow: domain("Tallystick Escrow", "0xE5C0E5C0E5C0E5C0e5c0E5c0e5C0e5C0E5C0E5c0".toLowerCase()),
  staking: domain("Tallystick", "0x57A457a457A457A457A457A457A457A457A457a4".toLowerCase()),
};

const TYPES = {
  Voucher: "address client,address node,uint256 total",
  Bind: "address node,uint256 deadline",
  Receipt:
    "address node,bytes32 model,bytes32 numericClass,bytes32 session,uint32 attempt,uint16 start,uint16 end," +
    "uint32 first,uint32 last,uint32 revision,bytes32 context,bytes32 input,bytes32 output,bytes32 previous," +
    "bytes32 challenge,bytes32 sketches,uint48 at",
  Offer:
    "address node,bytes32 model,bytes32 numericClass,uint16 start,uint16 end,uint256 price,uint256 credit," +
    "uint32 maxLength,uint64 seq,uint64 expires",
  SessionOpen:
    "address node,bytes32 spki,bytes32 offer,address client,bytes32 nonce,bytes32 model,uint16 start,uint16 end," +
    "uint32 attempt,address previous,address next,uint32 maxLength,uint16 topK,uint64 issued,uint64 expires",
  Opened: "bytes32 open,bytes32 spki,uint256 credit,uint64 expires",
};
const fieldsOf = (primary) => TYPES[primary].split(",").map((field) => field.split(" "));

/** A value of a field: `seed` different ones each, and the largest. */
function value(type, name, seed) {
  if (type === "address") return seed === "max" ? address("ff") : `0x${id(`${name} ${seed}`).slice(26)}`;
  if (type === "bytes32") return seed === "max" ? `0x${"ff".repeat(32)}` : seed === "zero" ? `0x${"00".repeat(32)}` : word(`${name} ${seed}`);
  if (type === "bool") return true;
  const bits = BigInt(type.slice(4));
  const top = (1n << bits) - 1n;
  return String(seed === "max" ? top : seed === "zero" ? 0n : BigInt(id(`${name} ${seed}`)) & top);
}

function struct(primary, domainName, message) {
  const types = { [primary]: fieldsOf(primary).map(([type, name]) => ({ type, name })) };
  const { separator: _, ...fields } = domains[domainName];
  const type = `${primary}(${TYPES[primary]})`;
  return {
    primary,
    domain: domainName,
    type,
    typeHash: id(type),
    message,
    structHash: TypedDataEncoder.hashStruct(primary, types, message),
    digest: TypedDataEncoder.hash(fields, types, message),
  };
}

const message = (primary, seed) => Object.fromEntries(fieldsOf(primary).map(([type, name]) => [name, value(type, name, seed)]));
// Real parties for the two that the contracts check: their signatures are below.
const voucher = { client: signerOf("client"), node: signerOf("node"), total: "1234567890123456789" };
const binding = { node: signerOf("node"), deadline: "1900000000" };
const structs = [struct("Voucher", "escrow", voucher), struct("Bind", "staking", binding)];
for (const primary of Object.keys(TYPES)) {
  for (const seed of ["one", "zero", "max"]) {
    structs.push(struct(primary, primary === "Voucher" ? "escrow" : "staking", message(primary, seed)));
  }
}

// Signatures over the first two digests: the client's voucher (for Escrow.redeem), the hot key's binding (for Staking.bind).
const hex = (n) => toBeHex(n, 32);
function signatures({ primary, digest }, name) {
  const { r, s, v } = key(name).sign(digest);
  const [high, flipped] = [hex(ORDER - BigInt(s)), v === 27 ? 28 : 27];
  const list = [
    [true, "65 bytes r, s, v", concat([r, s, toBeHex(v)])],
    [false, "high s", concat([r, high, toBeHex(flipped)])],
    [false, "high s, v kept", concat([r, high, toBeHex(v)])],
    [false, "v is 0 or 1", concat([r, s, toBeHex(v - 27, 1)])],
    [false, "the wrong v", concat([r, s, toBeHex(flipped)])],
    [false, "v is 29", concat([r, s, "0x1d"])],
    [false, "64 bytes (ERC-2098) where 65 are due", concat([r, hex(BigInt(s) | (BigInt(v - 27) << 255n))])],
    [false, "65 zero bytes", `0x${"00".repeat(65)}`],
    [false, "r is zero", concat([hex(0n), s, toBeHex(v)])],
    [false, "s is zero", concat([r, hex(0n), toBeHex(v)])],
    [false, "r is the group's order", concat([hex(ORDER), s, toBeHex(v)])],
    [false, "66 bytes", concat([r, s, toBeHex(v), "0x00"])],
    [false, "empty", "0x"],
    [false, "another key's", key("stranger").sign(digest).serialized],
    [false, "over another digest", key(name).sign(id("something else")).serialized],
  ];
  return list.map(([valid, why, signature]) => ({ primary, digest, signature, signer: signerOf(name), valid, why }));
}

const coder = AbiCoder.defaultAbiCoder();
const leafOf = ({ cidDigest, bytes }, index) =>
  keccak256(keccak256(coder.encode(["uint256", "bytes32", "uint64"], [index, cidDigest, bytes])));
const pair = (a, b) => keccak256(BigInt(a) < BigInt(b) ? concat([a, b]) : concat([b, a]));

/** The root over leaves, and each leaf's proof. */
function tree(leaves) {
  const proofs = leaves.map(() => []);
  let [level, places] = [leaves, leaves.map((_, i) => i)];
  while (level.length > 1) {
    places.forEach((place, leaf) => {
      const sibling = level[place ^ 1];
      if (sibling) proofs[leaf].push(sibling);
    });
    const above = [];
    for (let i = 0; i < level.length; i += 2) above.push(i + 1 < level.length ? pair(level[i], level[i + 1]) : level[i]);
    [level, places] = [above, places.map((place) => place >> 1)];
  }
  return { root: level[0], proofs };
}

const weights = [1, 2, 3, 6, 7, 11].map((count) => {
  const pieces = [...Array(count).keys()].map((i) => ({ cidDigest: word(`piece ${i} of ${count}`), bytes: String(4096 * (i + 1) + 7) }));
  const leaves = pieces.map(leafOf);
  return { pieces, leaves, ...tree(leaves) };
});
const ids = weights.map(({ root }, i) => {
  const [manifest, layers] = [word(`manifest ${i}`), String(i === 5 ? 65535 : i + 1)];
  return { manifest, weights: root, layers, id: keccak256(coder.encode(["bytes32", "bytes32", "uint16"], [manifest, root, layers])) };
});

// Messages that no contract reads, and the orders to Escrow (Gasless.t.sol): ethers says what Python has to compute.
const ORDERS = {
  Exit: "address client,address node,uint128 amount,uint256 nonce,uint256 deadline",
  SetSigner: "address client,address signer,bool on,uint256 nonce,uint256 deadline",
};
const OFFCHAIN = {
  PushOpen: "address node,bytes32 session,uint32 attempt,address previous,bytes32 spki,bytes32 nonce,uint64 issued",
  Resume: "address node,bytes32 session,uint32 number,bytes32 spki,uint64 issued",
  RelayRegister: "address relay,bytes32 spki,address node,bytes32 nonce,uint64 issued",
};
const offchain = Object.entries({ ...OFFCHAIN, ...ORDERS }).map(([primary, members]) => {
  TYPES[primary] = members;
  return struct(primary, primary in ORDERS ? "escrow" : "staking", message(primary, "one"));
});
const REACH = {
  Reach: "address node,uint64 seq,uint64 expires,bytes32[] spki,Addr[] addrs",
  Addr: "string kind,string host,uint16 port,string sni,address via",
};
const reachTypes = Object.fromEntries(
  Object.entries(REACH).map(([name, members]) => [name, members.split(",").map((member) => member.split(" ")).map(([type, name]) => ({ type, name }))]),
);
const addr = (kind, host, port, sni = "", via = address("00")) => ({ kind, host, port: String(port), sni, via });
const reaches = [
  { spki: [word("current"), word("next")], addrs: [addr("tcp", "203.0.113.5", 9000), addr("relay", "relay.example", 443, "", signerOf("relay"))] },
  { spki: [word("only")], addrs: [] },
  { spki: [word("only")], addrs: [addr("tcp", "2001:db8::5", 65535, "name.example"), addr("punch", "ü", 0)] },
].map((rest, i) => {
  const value = { node: signerOf("node"), seq: String(1_700_000_000 + i), expires: "1700086400", ...rest };
  const { separator: _, ...fields } = domains.staking;
  return { message: value, digest: TypedDataEncoder.hash(fields, reachTypes, value) };
});

const text = `${JSON.stringify(
  {
    domains,
    structs,
    offchain,
    reach: reaches,
    models: { id: ids, weights },
    signatures: [...signatures(structs[0], "client"), ...signatures(structs[1], "hot key")],
  },
  null,
  1,
)}\n`;
if (!process.argv.includes("--check")) writeFileSync(FILE, text);
else if (readFileSync(FILE, "utf8") !== text) {
  console.error("vectors: tests/vectors/eip712.json is stale; run: node contracts/test/vectors.js");
  process.exit(1);
}
