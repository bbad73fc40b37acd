// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {IModels} from "./interfaces/IModels.sol";
import {IStaking, Node} from "./interfaces/IStaking.sol";
import {IToken} from "./interfaces/IToken.sol";

/// @dev Invariants:
/// (S1) the token balance is the sum of all stakes (plus what strangers send here by mistake);
/// (S2) leaving <= stake;
/// (S3) weights(model) is the sum of active(node) over the model's nodes;
/// (S4) a slash takes no more than asked and no more than the stake, and burns at least half;
/// (S5) without slashes, stake(t') >= active(t) for every t' < t + UNBONDING;
/// (S6) nothing is withdrawn while held;
/// (S7) weightAt never exceeds the weight at the epoch's boundary.
///
/// TOKEN is our own and calls nobody, so there is no reentrancy to guard against. Its cap is below 2^90, so that amounts
/// fit 104 bits once they have been transferred.
contract Staking is IStaking, EIP712 {
    /// @dev `active` now, `past` at the beginning of epoch `since`, the last epoch in which it changed.
    struct Weight {
        uint104 active;
        uint104 past;
        uint48 since;
    }

    bytes32 private constant BIND_TYPEHASH = keccak256("Bind(address node,uint256 deadline)");
    uint256 private constant MAX_ENDPOINT = 256;

    IToken public immutable TOKEN;
    IModels public immutable MODELS;
    address public immutable SLASHER;
    uint256 public immutable MIN_STAKE;
    uint256 public immutable UNBONDING;
    uint256 public immutable EPOCH;

    mapping(address node => Node) private _nodes;
    mapping(bytes32 model => Weight) private _weights;
    mapping(address signer => address node) public nodeOf;

    constructor(IToken token, IModels models, address slasher, uint256 minStake, uint256 unbonding, uint256 epoch)
        EIP712("Tallystick", "1")
    {
        TOKEN = token;
        MODELS = models;
        SLASHER = slasher;
        MIN_STAKE = minStake;
        UNBONDING = unbonding;
        EPOCH = epoch;
    }

    modifier onlySlasher() {
        require(msg.sender == SLASHER, NotSlasher(msg.sender, SLASHER));
        _;
    }

    // The owner's word

    /// @inheritdoc IStaking
    function stake(address node, uint256 amount) external {
        Node storage n = _nodes[node];
        uint256 remaining = n.stake - n.leaving + amount;
        require(remaining >= MIN_STAKE, TooLittle(remaining, MIN_STAKE));
        uint256 before = _active(n);
        // No truncation: an amount above the token's cap fails in the transfer.
        n.stake += uint104(amount);
        _reweigh(n, before);
        emit Staked(node, msg.sender, amount, n.stake);
        TOKEN.transferFrom(msg.sender, address(this), amount);
    }

    /// @inheritdoc IStaking
    function bind(address signer, uint256 deadline, bytes calldata signature) external {
        require(block.timestamp <= deadline, Expired(block.timestamp, deadline));
        require(nodeOf[signer] == address(0), KeyTaken(signer, nodeOf[signer]));
        bytes32 digest = _hashTypedDataV4(keccak256(abi.encode(BIND_TYPEHASH, msg.sender, deadline)));
        (address recovered, ECDSA.RecoverError err,) = ECDSA.tryRecoverCalldata(digest, signature);
        require(err == ECDSA.RecoverError.NoError && recovered == signer, BadProof(recovered, signer));
        nodeOf[signer] = msg.sender;
        emit SignerBound(msg.sender, signer);
    }

    /// @inheritdoc IStaking
    function setPayee(address payee) external {
        _nodes[msg.sender].payee = payee;
        emit PayeeSet(msg.sender, payee);
    }

    /// @inheritdoc IStaking
    function serve(
        bytes32 model,
        uint16 start,
        uint16 end,
        uint256 price,
        bytes calldata endpoint,
        address operator
    ) external {
        Node storage n = _nodes[msg.sender];
        uint104 bonded = n.stake - n.leaving;
        uint256 layers = MODELS.layersOf(model);
        // No check for a bound signer: without one nobody can be shown a signature, so nobody will pay.
        require(start < end && end <= layers, BadRange(start, end, layers));
        require(bonded != 0 && bonded >= MIN_STAKE, TooLittle(bonded, MIN_STAKE));
        require(endpoint.length <= MAX_ENDPOINT, EndpointTooLong(endpoint.length, MAX_ENDPOINT));
        if (n.model != model) {
            if (n.model != 0) _shift(n.model, bonded, 0);
            _shift(model, 0, bonded);
            // In its new model the node weighed nothing at this epoch's beginning.
            (n.model, n.past, n.since) = (model, 0, _epoch(block.timestamp));
        }
        (n.start, n.end) = (start, end);
        emit Serving(msg.sender, model, start, end, operator, price, endpoint);
    }

    /// @inheritdoc IStaking
    function unbond(uint256 amount) external {
        Node storage n = _nodes[msg.sender];
        uint256 bonded = n.stake - n.leaving;
        require(amount <= bonded, TooMuch(amount, bonded));
        uint256 remaining = bonded - amount;
        require(remaining == 0 || remaining >= MIN_STAKE, TooLittle(remaining, MIN_STAKE));
        uint256 before = _active(n);
        n.leaving += uint104(amount);
        n.leaveAt = uint48(block.timestamp + UNBONDING);
        _reweigh(n, before);
        emit Unbonding(msg.sender, amount, n.leaving, n.leaveAt);
    }

    /// @inheritdoc IStaking
    function withdraw() external {
        Node storage n = _nodes[msg.sender];
        require(block.timestamp >= n.leaveAt, NotReady(block.timestamp, n.leaveAt));
        require(n.holds == 0, Held(n.holds));
        uint256 amount = n.leaving;
        (n.stake, n.leaving) = (n.stake - n.leaving, 0);
        emit Withdrawn(msg.sender, amount);
        TOKEN.transfer(msg.sender, amount);
    }

    // The slasher's word

    /// @inheritdoc IStaking
    function hold(address node, bool on) external onlySlasher {
        Node storage n = _nodes[node];
        require(on || n.holds != 0, NotHeld(node));
        n.holds = on ? n.holds + 1 : n.holds - 1;
        emit HoldSet(node, n.holds);
    }

    /// @inheritdoc IStaking
    function slash(address node, uint256 amount, uint256 bounty, address to)
        external
        onlySlasher
        returns (uint256 taken)
    {
        Node storage n = _nodes[node];
        uint256 before = _active(n);
        taken = amount < n.stake ? amount : n.stake;
        uint256 paid = bounty < taken / 2 ? bounty : taken / 2;
        n.stake -= uint104(taken);
        // Active stake pays first; no proportional rounding.
        if (n.leaving > n.stake) n.leaving = n.stake;
        _reweigh(n, before);
        emit Slashed(node, taken, paid, to);
        TOKEN.burn(taken - paid);
        if (paid != 0) TOKEN.transfer(to, paid);
    }

    // Views

    /// @inheritdoc IStaking
    function nodes(address node) external view returns (Node memory) {
        return _nodes[node];
    }

    /// @inheritdoc IStaking
    function payeeOf(address node) external view returns (address) {
        address payee = _nodes[node].payee;
        return payee == address(0) ? node : payee;
    }

    /// @inheritdoc IStaking
    function active(address node) external view returns (uint256) {
        return _active(_nodes[node]);
    }

    /// @inheritdoc IStaking
    function weights(bytes32 model) external view returns (uint256) {
        return _weights[model].active;
    }

    /// @inheritdoc IStaking
    function weightAt(address node, uint256 time) external view returns (uint256) {
        Node storage n = _nodes[node];
        uint256 current = _active(n);
        uint256 boundary = _boundary(current, n.past, n.since, time);
        return current < boundary ? current : boundary;
    }

    /// @inheritdoc IStaking
    function totalAt(bytes32 model, uint256 time) external view returns (uint256) {
        Weight storage w = _weights[model];
        return _boundary(w.active, w.past, w.since, time);
    }

    // Weights

    function _epoch(uint256 time) private view returns (uint48) {
        return uint48(time / EPOCH);
    }

    function _active(Node storage n) private view returns (uint256) {
        return n.model == 0 ? 0 : n.stake - n.leaving;
    }

    /// Notes that the node's weight was `before` until now, in its own record and in its model's.
    function _reweigh(Node storage n, uint256 before) private {
        uint256 current = _active(n);
        if (current == before) return;
        uint48 epoch = _epoch(block.timestamp);
        if (n.since != epoch) (n.past, n.since) = (uint104(before), epoch);
        _shift(n.model, uint104(before), uint104(current));
    }

    /// Replaces `less` by `more` in a model's total.
    function _shift(bytes32 model, uint104 less, uint104 more) private {
        Weight memory w = _weights[model];
        uint48 epoch = _epoch(block.timestamp);
        if (w.since != epoch) (w.past, w.since) = (w.active, epoch);
        w.active = w.active - less + more;
        _weights[model] = w;
    }

    /// The weight at the beginning of `time`'s epoch, out of the weight now and the one remembered.
    function _boundary(uint256 current, uint256 past, uint256 since, uint256 time) private view returns (uint256) {
        (uint256 epoch, uint256 newest) = (time / EPOCH, block.timestamp / EPOCH);
        require(since <= epoch && epoch <= newest, UnknownEpoch(epoch, since, newest));
        return epoch == since ? past : current;
    }
}
