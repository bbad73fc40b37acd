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
// `malformed`: no key signed that, so nothing may be recovered from it; the other invalid ones are somebody else's.
const FIELD = 2n ** 256n - 2n ** 32n - 977n;
const HALF = ORDER / 2n;
const ONES = 2n ** 256n - 1n;
const hex = (n) => toBeHex(n, 32);
const stripped = (word) => `0x${word.slice(2).replace(/^(00)+/, "")}`;

function power(base, exponent, modulus) {
  let result = 1n;
  for (; exponent; exponent >>= 1n, base = (base * base) % modulus) if (exponent & 1n) result = (result * base) % modulus;
  return result;
}

/** r, s, v with s R = e G: what they recover is the point at infinity, which is nobody's key. */
function infinity(digest) {
  const [nonce, e] = [7n, BigInt(digest) % ORDER];
  const point = new SigningKey(hex(nonce)).compressedPublicKey;
  const s = (e * power(nonce, ORDER - 2n, ORDER)) % ORDER;
  const odd = point.slice(2, 4) === "03";
  return concat([`0x${point.slice(4)}`, hex(s > HALF ? ORDER - s : s), toBeHex(odd !== s > HALF ? 28 : 27)]);
}

/** DER, as Bitcoin and X.509 write signatures. */
function der(r, s) {
  const integer = (word) => {
    const bytes = stripped(word).slice(2);
    const padded = parseInt(bytes.slice(0, 2), 16) > 127 ? `00${bytes}` : bytes;
    return concat(["0x02", toBeHex(padded.length / 2), `0x${padded}`]);
  };
  const body = concat([integer(r), integer(s)]);
  return concat(["0x30", toBeHex((body.length - 2) / 2), body]);
}

function signatures({ primary, digest }, name) {
  const { r, s, v } = key(name).sign(digest);
  const [mirrored, flipped] = [hex(ORDER - BigInt(s)), v === 27 ? 28 : 27];
  const made = (r, s, v) => concat([typeof r === "bigint" ? hex(r) : r, typeof s === "bigint" ? hex(s) : s, toBeHex(v, 1)]);
  const good = made(r, s, v);
  const malformed = [
    ["empty", "0x"],
    ["one byte", "0x1b"],
    ["r and s without v", concat([r, s])],
    ["64 bytes (ERC-2098) where 65 are due", concat([r, hex(BigInt(s) | (BigInt(v - 27) << 255n))])],
    ["v in front", concat([toBeHex(v), r, s])],
    ["66 bytes", concat([good, "0x00"])],
    ["66 bytes, a zero in front", concat(["0x00", good])],
    ["twice", concat([good, good])],
    ["DER", der(r, s)],
    ["a contract's (ERC-1271): key, offset and bytes", concat([made(r, s, v), hex(65n), good])],
    ["a counterfactual contract's (ERC-6492)", concat([good, `0x${"6492".repeat(16)}`])],
    ["65 zero bytes", `0x${"00".repeat(65)}`],
    ["zeros with a v", made(0n, 0n, 27)],
    ["all ones", `0x${"ff".repeat(65)}`],
    ["v is 0 or 1", made(r, s, v - 27)],
    ["v is 2 or 3, an r beyond the order", made(r, s, v - 25)],
    ["v is 26", made(r, s, 26)],
    ["v is 29", made(r, s, 29)],
    ["v is 30", made(r, s, 30)],
    ["v of a compressed key (31 or 32)", made(r, s, v + 4)],
    ["v of EIP-155", made(r, s, v + 10)],
    ["v with its highest bit", made(r, s, v + 128)],
    ["v is 255", made(r, s, 255)],
    ["high s", made(r, mirrored, flipped)],
    ["high s, v kept", made(r, mirrored, v)],
    ["s is zero", made(r, 0n, v)],
    ["s just above half of the order", made(r, HALF + 1n, v)],
    ["s is the order less one", made(r, ORDER - 1n, v)],
    ["s is the order", made(r, ORDER, v)],
    ["s is the order and one", made(r, ORDER + 1n, v)],
    ["s all ones", made(r, ONES, v)],
    ["r is zero", made(0n, s, v)],
    ["r is the order", made(ORDER, s, v)],
    ["r is the order and one", made(ORDER + 1n, s, v)],
    ["r is the field's size", made(FIELD, s, v)],
    ["r is beyond the field", made(FIELD + 1n, s, v)],
    ["r all ones", made(ONES, s, v)],
    ["r is on no point of the curve", made(5n, s, v)],
    ["r and s are zero and the order", made(0n, ORDER, v)],
    ["recovers the point at infinity", infinity(digest)],
  ];
  const others = [
    ["the wrong v", made(r, s, flipped)],
    ["another key's", key("stranger").sign(digest).serialized],
    ["over another digest", key(name).sign(id("something else")).serialized],
    ["anybody's: r of the generator, s one", made(BigInt(`0x${new SigningKey(hex(1n)).compressedPublicKey.slice(4)}`), 1n, 27)],
    ["s is half of the order", made(r, HALF, v)],
  ];
  const entry = (valid, malformed, who) => ([why, signature]) => ({
    primary, digest, signature, signer: signerOf(who), valid, malformed, why,
  });
  return [
    entry(true, false, name)(["65 bytes r, s, v", good]),
    ...malformed.map(entry(false, true, name)),
    ...others.map(entry(false, false, name)),
  ];
}

/** Keys whose signatures of the digest begin with a zero: valid with it, malformed without. */
function leadingZeros({ primary, digest }) {
  const found = [];
  for (const part of ["r", "s"]) {
    let number = 0;
    while (!key(`short ${part} ${number}`).sign(digest)[part].startsWith("0x00")) number++;
    const name = `short ${part} ${number}`;
    const { r, s, v } = key(name).sign(digest);
    const common = { primary, digest, signer: signerOf(name) };
    const [whole, short] = [concat([r, s, toBeHex(v)]), concat([stripped(r), stripped(s), toBeHex(v)])];
    found.push({ ...common, signature: whole, valid: true, malformed: false, why: `${part} begins with a zero` });
    found.push({ ...common, signature: short, valid: false, malformed: true, why: `the zero of ${part} is left out` });
  }
  return found;
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
    signatures: [...signatures(structs[0], "client"), ...signatures(structs[1], "hot key"), ...leadingZeros(structs[1])],
  },
  null,
  1,
)}\n`;
if (!process.argv.includes("--check")) writeFileSync(FILE, text);
else if (readFileSync(FILE, "utf8") !== text) {
  console.error("vectors: tests/vectors/eip712.json is stale; run: node contracts/test/vectors.js");
  process.exit(1);
}
