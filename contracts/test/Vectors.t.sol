// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Receipt} from "../interfaces/ICourt.sol";
import {IEscrow, Row} from "../interfaces/IEscrow.sol";
import {IStaking} from "../interfaces/IStaking.sol";
import {World, vm} from "./World.sol";

// The signed messages that no contract reads yet, as Solidity sees them. All their fields are static, so abi.encode of the
// struct is EIP-712's encodeData.

struct Voucher {
    address client;
    address node;
    uint256 total;
}

struct Bind {
    address node;
    uint256 deadline;
}

struct Offer {
    address node;
    bytes32 model;
    bytes32 numericClass;
    uint16 start;
    uint16 end;
    uint256 price;
    uint256 credit;
    uint32 maxLength;
    uint64 seq;
    uint64 expires;
}

struct SessionOpen {
    address node;
    bytes32 spki;
    bytes32 offer;
    address client;
    bytes32 nonce;
    bytes32 model;
    uint16 start;
    uint16 end;
    uint32 attempt;
    address previous;
    address next;
    uint32 maxLength;
    uint16 topK;
    uint64 issued;
    uint64 expires;
}

struct Opened {
    bytes32 open;
    bytes32 spki;
    uint256 credit;
    uint64 expires;
}

contract VectorsTest is World {
    string private constant FILE = "tests/vectors/eip712.json";
    string private json;

    function setUp() public override {
        super.setUp();
        json = vm.readFile(FILE);
        vm.chainId(vm.parseJsonUint(json, ".domains.escrow.chainId"));
        // The very contracts, at the vectors' addresses.
        address place = vm.parseJsonAddress(json, ".domains.escrow.verifyingContract");
        vm.etch(place, address(escrow).code);
        escrow = IEscrow(place);
        token.approve(place, type(uint256).max);
        place = vm.parseJsonAddress(json, ".domains.staking.verifyingContract");
        vm.etch(place, address(staking).code);
        staking = IStaking(place);
    }

    function path(string memory list, uint256 i, string memory field) private pure returns (string memory) {
        return string.concat(".", list, "[", vm.toString(i), "]", field);
    }

    function uintAt(uint256 i, string memory field) private view returns (uint256) {
        return vm.parseJsonUint(json, path("structs", i, string.concat(".message.", field)));
    }

    function addressAt(uint256 i, string memory field) private view returns (address) {
        return vm.parseJsonAddress(json, path("structs", i, string.concat(".message.", field)));
    }

    function wordAt(uint256 i, string memory field) private view returns (bytes32) {
        return vm.parseJsonBytes32(json, path("structs", i, string.concat(".message.", field)));
    }

    function same(string memory a, string memory b) private pure returns (bool) {
        return keccak256(bytes(a)) == keccak256(bytes(b));
    }

    function test_domains() public view {
        bytes32 expected = vm.parseJsonBytes32(json, ".domains.escrow.separator");
        assertEq(separator("Tallystick Escrow", address(escrow)), expected);
        expected = vm.parseJsonBytes32(json, ".domains.staking.separator");
        assertEq(separator("Tallystick", address(staking)), expected);
    }

    function test_structs() public view {
        uint256 seen;
        for (; vm.keyExistsJson(json, path("structs", seen, "")); seen++) {
            bytes32 typeHash = keccak256(bytes(vm.parseJsonString(json, path("structs", seen, ".type"))));
            assertEq(vm.parseJsonBytes32(json, path("structs", seen, ".typeHash")), typeHash);
            bytes32 structHash = keccak256(bytes.concat(typeHash, encoded(seen)));
            assertEq(vm.parseJsonBytes32(json, path("structs", seen, ".structHash")), structHash);
            string memory domain = string.concat(".domains.", vm.parseJsonString(json, path("structs", seen, ".domain")));
            bytes32 domainHash = vm.parseJsonBytes32(json, string.concat(domain, ".separator"));
            bytes32 digest = keccak256(abi.encodePacked("\x19\x01", domainHash, structHash));
            assertEq(vm.parseJsonBytes32(json, path("structs", seen, ".digest")), digest);
        }
        assertEq(seen, 20);
    }

    function encoded(uint256 i) private view returns (bytes memory) {
        string memory primary = vm.parseJsonString(json, path("structs", i, ".primary"));
        if (same(primary, "Voucher")) {
            return abi.encode(Voucher(addressAt(i, "client"), addressAt(i, "node"), uintAt(i, "total")));
        }
        if (same(primary, "Bind")) return abi.encode(Bind(addressAt(i, "node"), uintAt(i, "deadline")));
        if (same(primary, "Receipt")) return receipt(i);
        if (same(primary, "Offer")) return offer(i);
        if (same(primary, "SessionOpen")) return sessionOpen(i);
        require(same(primary, "Opened"), "an unknown struct");
        return abi.encode(Opened(wordAt(i, "open"), wordAt(i, "spki"), uintAt(i, "credit"), uint64(uintAt(i, "expires"))));
    }

    function receipt(uint256 i) private view returns (bytes memory) {
        Receipt memory r;
        r.node = addressAt(i, "node");
        r.model = wordAt(i, "model");
        r.numericClass = wordAt(i, "numericClass");
        r.session = wordAt(i, "session");
        r.attempt = uint32(uintAt(i, "attempt"));
        r.start = uint16(uintAt(i, "start"));
        r.end = uint16(uintAt(i, "end"));
        r.first = uint32(uintAt(i, "first"));
        r.last = uint32(uintAt(i, "last"));
        r.revision = uint32(uintAt(i, "revision"));
        r.context = wordAt(i, "context");
        r.input = wordAt(i, "input");
        r.output = wordAt(i, "output");
        r.previous = wordAt(i, "previous");
        r.challenge = wordAt(i, "challenge");
        r.sketches = wordAt(i, "sketches");
        r.time = uint48(uintAt(i, "at"));
        return abi.encode(r);
    }

    function offer(uint256 i) private view returns (bytes memory) {
        Offer memory o;
        o.node = addressAt(i, "node");
        o.model = wordAt(i, "model");
        o.numericClass = wordAt(i, "numericClass");
        o.start = uint16(uintAt(i, "start"));
        o.end = uint16(uintAt(i, "end"));
        o.price = uintAt(i, "price");
        o.credit = uintAt(i, "credit");
        o.maxLength = uint32(uintAt(i, "maxLength"));
        o.seq = uint64(uintAt(i, "seq"));
        o.expires = uint64(uintAt(i, "expires"));
        return abi.encode(o);
    }

    function sessionOpen(uint256 i) private view returns (bytes memory) {
        SessionOpen memory o;
        o.node = addressAt(i, "node");
        o.spki = wordAt(i, "spki");
        o.offer = wordAt(i, "offer");
        o.client = addressAt(i, "client");
        o.nonce = wordAt(i, "nonce");
        o.model = wordAt(i, "model");
        o.start = uint16(uintAt(i, "start"));
        o.end = uint16(uintAt(i, "end"));
        o.attempt = uint32(uintAt(i, "attempt"));
        o.previous = addressAt(i, "previous");
        o.next = addressAt(i, "next");
        o.maxLength = uint32(uintAt(i, "maxLength"));
        o.topK = uint16(uintAt(i, "topK"));
        o.issued = uint64(uintAt(i, "issued"));
        o.expires = uint64(uintAt(i, "expires"));
        return abi.encode(o);
    }

    /// Escrow and Staking take the valid signatures and no others; of the malformed ones nobody is recovered.
    function test_signatures() public {
        (uint256 seen, uint256 valid) = (0, 0);
        for (; vm.keyExistsJson(json, path("signatures", seen, "")); seen++) {
            bytes memory signature = vm.parseJsonBytes(json, path("signatures", seen, ".signature"));
            bool expected = vm.parseJsonBool(json, path("signatures", seen, ".valid"));
            bool voucher = same(vm.parseJsonString(json, path("signatures", seen, ".primary")), "Voucher");
            bool taken = voucher ? redeems(signature) : binds(signature, seen);
            require(taken == expected, vm.parseJsonString(json, path("signatures", seen, ".why")));
            if (taken) valid++;
        }
        assertEq(seen, 96);
        assertEq(valid, 4);
    }

    /// A row has no v and no length of its own: those signatures that can be put into a row at all are tried.
    function redeems(bytes memory signature) private returns (bool) {
        if (signature.length != 65 || (signature[64] != 0x1b && signature[64] != 0x1c)) return false;
        bytes32 r;
        uint256 s;
        assembly {
            r := mload(add(signature, 32))
            s := mload(add(signature, 64))
        }
        Row[] memory list = new Row[](1);
        uint256 parity = uint256(uint8(signature[64]) - 27) << 255;
        list[0] = Row(addressAt(0, "client"), uintAt(0, "total"), r, bytes32(s | parity));
        fund(list[0].client, addressAt(0, "node"), 1);
        return escrow.redeem(addressAt(0, "node"), list)[0] != 0;
    }

    function binds(bytes memory signature, uint256 i) private returns (bool) {
        address signer = vm.parseJsonAddress(json, path("signatures", i, ".signer"));
        bool bound = staking.nodeOf(signer) != address(0);
        if (bound) signer = address(1); // by the valid one, and refused as KeyTaken anyway
        vm.prank(addressAt(1, "node"));
        try staking.bind(signer, uintAt(1, "deadline"), signature) {
            return true;
        } catch (bytes memory reason) {
            bytes memory nobody = abi.encodeWithSelector(IStaking.BadProof.selector, address(0), signer);
            bool recovered = keccak256(reason) != keccak256(nobody);
            bool malformed = vm.parseJsonBool(json, path("signatures", i, ".malformed"));
            require(recovered != malformed, vm.parseJsonString(json, path("signatures", i, ".why")));
            return false;
        }
    }

    function test_models() public {
        uint256 seen;
        for (; vm.keyExistsJson(json, path("models.id", seen, "")); seen++) {
            bytes32 manifest = vm.parseJsonBytes32(json, path("models.id", seen, ".manifest"));
            bytes32 root = vm.parseJsonBytes32(json, path("models.id", seen, ".weights"));
            uint16 layers = uint16(vm.parseJsonUint(json, path("models.id", seen, ".layers")));
            bytes32 id = models.add(manifest, root, layers);
            assertEq(id, vm.parseJsonBytes32(json, path("models.id", seen, ".id")));
            assertEq(root, vm.parseJsonBytes32(json, path("models.weights", seen, ".root")));
            pieces(id, path("models.weights", seen, ""));
        }
        assertEq(seen, 6);
    }

    function pieces(bytes32 id, string memory list) private view {
        bytes32[] memory leaves = vm.parseJsonBytes32Array(json, string.concat(list, ".leaves"));
        for (uint256 i = 0; i < leaves.length; i++) {
            string memory piece = string.concat(list, ".pieces[", vm.toString(i), "]");
            bytes32 cidDigest = vm.parseJsonBytes32(json, string.concat(piece, ".cidDigest"));
            uint64 size = uint64(vm.parseJsonUint(json, string.concat(piece, ".bytes")));
            assertEq(leaves[i], keccak256(bytes.concat(keccak256(abi.encode(i, cidDigest, size)))));
            string memory proofPath = string.concat(list, ".proofs[", vm.toString(i), "]");
            bytes32[] memory siblings = vm.parseJsonBytes32Array(json, proofPath);
            require(models.holds(id, leaves[i], siblings), "a piece is missing");
            require(!models.holds(id, keccak256("no piece"), siblings), "a stranger is held");
        }
    }
}
