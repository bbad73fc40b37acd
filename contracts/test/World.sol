// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Deposit, IEscrow, Order, Row} from "../interfaces/IEscrow.sol";
import {IModels} from "../interfaces/IModels.sol";
import {IStaking} from "../interfaces/IStaking.sol";
import {IToken} from "../interfaces/IToken.sol";
import {Vm} from "./Vm.sol";

Vm constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));

/// What invariant tests leave out, in the form that the runner asks for.
struct FuzzSelector {
    address addr;
    bytes4[] selectors;
}

abstract contract Assertions {
    function assertEq(uint256 actual, uint256 expected) internal pure {
        require(actual == expected, string.concat(vm.toString(actual), " is not ", vm.toString(expected)));
    }

    function assertEq(address actual, address expected) internal pure {
        require(actual == expected, "another address");
    }

    function assertEq(bytes32 actual, bytes32 expected) internal pure {
        require(actual == expected, "other bytes");
    }

    function assertLe(uint256 a, uint256 b, string memory what) internal pure {
        require(a <= b, string.concat(what, ": ", vm.toString(a), " > ", vm.toString(b)));
    }

    function within(uint256 x, uint256 low, uint256 high) internal pure returns (uint256) {
        return low + x % (high - low + 1);
    }
}

/// Hands on a constructor's own error.
contract Maker {
    function make(bytes memory code) external {
        assembly {
            if iszero(create(0, add(code, 32), mload(code))) {
                returndatacopy(0, 0, returndatasize())
                revert(0, returndatasize())
            }
        }
    }
}

/// Token, Models, Staking and Escrow as built for deployment, with the production parameters. This contract is treasury and,
/// unless a test says otherwise, minter and slasher.
/// The tests take the contracts from the artifacts: it is the deployed bytecode that is tested, and it is compiled once.
abstract contract World is Assertions {
    uint256 internal constant START = 1_800_000_000; // 20833 days and 8 hours: the middle of an epoch
    uint256 internal constant NODE_KEY = 0xA11CE;
    uint256 internal constant CLIENT_KEY = 0xC11E;
    uint256 internal constant SESSION_KEY = 0x5E55;
    uint256 internal constant STRANGER_KEY = 0xBAD;

    IToken internal token;
    IModels internal models;
    IStaking internal staking;
    IEscrow internal escrow;

    uint256 internal minStake;
    uint256 internal unitSize;
    uint256 internal unbonding;
    uint256 internal epoch;
    uint256 internal stale;
    uint256 internal feeBps;
    uint256 internal exitDelay;

    address internal node = vm.addr(NODE_KEY);
    address internal client = vm.addr(CLIENT_KEY);
    address internal session = vm.addr(SESSION_KEY);
    address internal stranger = vm.addr(STRANGER_KEY);
    bytes32 internal llama; // 8 layers
    bytes32 internal bert; // 4 layers

    function setUp() public virtual {
        vm.warp(START);
        uint256 genesis = parameter("GENESIS");
        minStake = parameter("MIN_STAKE");
        unitSize = minStake / 2;
        unbonding = parameter("UNBONDING");
        epoch = parameter("EPOCH");
        stale = parameter("STALE");
        feeBps = parameter("FEE_BPS");
        exitDelay = parameter("EXIT_DELAY");
        (address minter, address slasher) = authorities();
        token = IToken(deploy("Token", abi.encode(minter, this, genesis)));
        models = IModels(deploy("Models", ""));
        staking = IStaking(deploy("Staking", abi.encode(token, models, slasher, minStake, unbonding, epoch, stale)));
        escrow = IEscrow(deploy("Escrow", abi.encode(staking, feeBps, exitDelay)));
        llama = models.add("llama", "pieces", 8);
        bert = models.add("bert", "pieces", 4);
        token.approve(address(staking), type(uint256).max);
        token.approve(address(escrow), type(uint256).max);
    }

    function authorities() internal virtual returns (address minter, address slasher) {
        return (address(this), address(this));
    }

    function initcode(string memory name, bytes memory args) internal view returns (bytes memory) {
        string memory artifact = vm.readFile(string.concat("artifacts/contracts/", name, ".sol/", name, ".json"));
        return bytes.concat(vm.parseJsonBytes(artifact, ".bytecode"), args);
    }

    function deploy(string memory name, bytes memory args) internal returns (address) {
        return create(initcode(name, args));
    }

    function create(bytes memory code) internal returns (address made) {
        assembly {
            made := create(0, add(code, 32), mload(code))
        }
        require(made != address(0), "the constructor reverted");
    }

    function refusesToDeploy(bytes memory code, bytes memory reason) internal {
        Maker maker = new Maker();
        vm.expectRevert(reason);
        maker.make(code);
    }

    function parameter(string memory name) internal view returns (uint256) {
        return vm.parseJsonUint(vm.readFile("contracts/parameters.json"), string.concat(".", name));
    }

    /// `who` serves `model` with `amount` staked.
    function serving(address who, bytes32 model, uint256 amount) internal {
        staking.stake(who, amount);
        vm.prank(who);
        staking.serve(model, 0, 4, 1 gwei, "tcp:1.2.3.4:5", who);
    }

    function fund(address who, address to, uint256 amount) internal {
        Deposit[] memory deposits = new Deposit[](1);
        deposits[0] = Deposit(to, uint128(amount));
        escrow.fund(who, deposits);
    }

    function separator(string memory name, address verifier) internal view returns (bytes32) {
        bytes32 domain = keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");
        return keccak256(abi.encode(domain, keccak256(bytes(name)), keccak256("1"), block.chainid, verifier));
    }

    function voucherDigest(address who, address to, uint256 total) internal view returns (bytes32) {
        bytes32 structHash =
            keccak256(abi.encode(keccak256("Voucher(address client,address node,uint256 total)"), who, to, total));
        return keccak256(abi.encodePacked("\x19\x01", separator("Tallystick Escrow", address(escrow)), structHash));
    }

    function row(uint256 key, address who, address to, uint256 total) internal view returns (Row memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, voucherDigest(who, to, total));
        return Row(who, total, r, bytes32(uint256(s) | (uint256(v - 27) << 255)));
    }

    /// One row for `client` and `node`, signed by `key`.
    function rows(uint256 key, uint256 total) internal view returns (Row[] memory list) {
        list = new Row[](1);
        list[0] = row(key, client, node, total);
    }

    /// An order to leave a channel, signed by `key`.
    function exitOrder(uint256 key, address who, address to, uint128 amount, uint256 nonce, uint256 deadline)
        internal
        view
        returns (Order memory)
    {
        bytes32 kind = keccak256("Exit(address client,address node,uint128 amount,uint256 nonce,uint256 deadline)");
        return orderOf(key, who, nonce, deadline, keccak256(abi.encode(kind, who, to, amount, nonce, deadline)));
    }

    function orderOf(uint256 key, address who, uint256 nonce, uint256 deadline, bytes32 structHash)
        internal
        view
        returns (Order memory)
    {
        bytes32 digest = keccak256(abi.encodePacked("\x19\x01", separator("Tallystick Escrow", address(escrow)), structHash));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        return Order(who, nonce, deadline, r, bytes32(uint256(s) | (uint256(v - 27) << 255)));
    }

    function bindDigest(address who, uint256 deadline) internal view returns (bytes32) {
        bytes32 structHash = keccak256(abi.encode(keccak256("Bind(address node,uint256 deadline)"), who, deadline));
        return keccak256(abi.encodePacked("\x19\x01", separator("Tallystick", address(staking)), structHash));
    }

    function proof(uint256 key, address who, uint256 deadline) internal view returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, bindDigest(who, deadline));
        return abi.encodePacked(r, s, v);
    }
}

/// Invariants of what the functions of one handler, its own setting up left out, do in any order.
abstract contract Invariants is Assertions {
    World private _handler;

    function actedOnBy(World handler) internal {
        handler.setUp();
        _handler = handler;
    }

    function targetContracts() external view returns (address[] memory list) {
        list = new address[](1);
        list[0] = address(_handler);
    }

    function excludeSelectors() external view returns (FuzzSelector[] memory list) {
        list = new FuzzSelector[](1);
        list[0].addr = address(_handler);
        list[0].selectors = new bytes4[](1);
        list[0].selectors[0] = World.setUp.selector;
    }
}
