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
/// (S7) unitsAt is what the node had at the epoch's beginning, totalUnitsAt the sum of it over all nodes;
/// (S8) a jailed node has no weight, and nobody is jailed within STALE of its last sign of life.
///
/// TOKEN is our own and calls nobody, so there is no reentrancy to guard against. Its cap is below 2^90, so that amounts
/// fit 96 bits once they have been transferred.
contract Staking is IStaking, EIP712 {
    /// @dev `past` holds `units` at the beginning of epoch `since`, the last in which they changed, in its lowest BITS, and
    /// at the beginnings of the epochs before in the next ones.
    struct Total {
        uint24 units;
        uint32 since;
        uint152 past;
    }

    bytes32 private constant BIND_TYPEHASH = keccak256("Bind(address node,uint256 deadline)");
    uint256 private constant MAX_ENDPOINT = 256;
    uint256 private constant BITS = 21;
    uint256 private constant BOUNDARIES = 7;
    /// @dev A one at the lowest bit of each boundary.
    uint256 private constant ONES = ((1 << BITS * BOUNDARIES) - 1) / ((1 << BITS) - 1);

    IToken public immutable TOKEN;
    IModels public immutable MODELS;
    address public immutable SLASHER;
    uint256 public immutable MIN_STAKE;
    uint256 public immutable UNIT;
    uint256 public immutable UNBONDING;
    uint256 public immutable EPOCH;
    uint256 public immutable STALE;

    mapping(address node => Node) private _nodes;
    Total private _total;
    mapping(bytes32 model => uint256) public weights;
    mapping(address signer => address node) public nodeOf;

    constructor(
        IToken token,
        IModels models,
        address slasher,
        uint256 minStake,
        uint256 unbonding,
        uint256 epoch,
        uint256 stale
    ) EIP712("Tallystick", "1") {
        // Half of the least stake, so that a fine does not cost a node its only unit.
        UNIT = minStake / 2;
        uint256 units = token.CAP() / UNIT;
        require(units < 1 << BITS, TooManyUnits(units, (1 << BITS) - 1));
        // Else a node could be jailed before its next beat is due.
        require(stale > epoch, TooShortStale(stale, epoch));
        TOKEN = token;
        MODELS = models;
        SLASHER = slasher;
        MIN_STAKE = minStake;
        UNBONDING = unbonding;
        EPOCH = epoch;
        STALE = stale;
    }

    modifier onlySlasher() {
        require(msg.sender == SLASHER, NotSlasher(msg.sender, SLASHER));
        _;
    }

    // The owner's word

    /// @inheritdoc IStaking
    function stake(address node, uint256 amount) external {
        Node storage n = _nodes[node];
        (uint256 all, uint256 bonded, bool weighs) = (n.stake, n.stake, !n.jailed);
        uint256 remaining;
        // No overflow and no truncation: an amount above the token's cap fails in the transfer.
        unchecked {
            all += amount;
            bonded -= n.leaving;
            remaining = bonded + amount;
        }
        require(remaining >= MIN_STAKE, TooLittle(remaining, MIN_STAKE));
        n.stake = uint96(all);
        if (weighs) _reweigh(n, bonded, remaining);
        emit Staked(node, amount, all);
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
        uint256 bonded = n.stake - n.leaving;
        uint256 layers = MODELS.layersOf(model);
        // No check for a bound signer: without one nobody can be shown a signature, so nobody will pay.
        require(start < end && end <= layers, BadRange(start, end, layers));
        require(bonded != 0 && bonded >= MIN_STAKE, TooLittle(bonded, MIN_STAKE));
        require(endpoint.length <= MAX_ENDPOINT, EndpointTooLong(endpoint.length, MAX_ENDPOINT));
        (n.start, n.end, n.seenAt) = (start, end, uint40(block.timestamp));
        (bytes32 old, bool jailed) = (n.model, n.jailed);
        if (old != model || jailed) {
            uint256 before = jailed || old == 0 ? 0 : bonded;
            if (before != 0) weights[old] -= before;
            weights[model] += bonded;
            n.model = model;
            if (jailed) {
                n.jailed = false;
                emit Freed(msg.sender);
            }
            _count(n, before / UNIT, bonded / UNIT);
        }
        emit Serving(msg.sender, model, start, end, operator, price, endpoint);
    }

    /// @inheritdoc IStaking
    function unbond(uint256 amount) external {
        Node storage n = _nodes[msg.sender];
        uint256 bonded = n.stake - n.leaving;
        require(amount <= bonded, TooMuch(amount, bonded));
        uint256 remaining = bonded - amount;
        require(remaining == 0 || remaining >= MIN_STAKE, TooLittle(remaining, MIN_STAKE));
        n.leaving += uint96(amount);
        n.leaveAt = uint40(block.timestamp + UNBONDING);
        if (!n.jailed) _reweigh(n, bonded, remaining);
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

    // Signs of life

    /// @inheritdoc IStaking
    function beat() external {
        address node = nodeOf[msg.sender];
        if (node == address(0)) node = msg.sender;
        Node storage n = _nodes[node];
        require(n.end != 0, NotServing(node));
        bool jailed = n.jailed;
        require(jailed || block.timestamp >= n.seenAt + EPOCH, NotReady(block.timestamp, n.seenAt + EPOCH));
        n.seenAt = uint40(block.timestamp);
        if (jailed) {
            n.jailed = false;
            _reweigh(n, 0, n.stake - n.leaving);
            emit Freed(node);
        }
    }

    /// @inheritdoc IStaking
    function jail(address node) external {
        Node storage n = _nodes[node];
        require(n.end != 0, NotServing(node));
        require(!n.jailed, InJail(node));
        require(block.timestamp >= n.seenAt + STALE, NotReady(block.timestamp, n.seenAt + STALE));
        n.jailed = true;
        _reweigh(n, n.stake - n.leaving, 0);
        emit Jailed(node, msg.sender, n.seenAt);
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
        uint256 bonded = n.stake - n.leaving;
        taken = amount < n.stake ? amount : n.stake;
        uint256 paid = bounty < taken / 2 ? bounty : taken / 2;
        n.stake -= uint96(taken);
        // Active stake pays first; no proportional rounding.
        if (n.leaving > n.stake) n.leaving = n.stake;
        if (!n.jailed) _reweigh(n, bonded, n.stake - n.leaving);
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
    function stakeOf(address node) external view returns (uint256) {
        return _nodes[node].stake;
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
    function isJailed(address node) external view returns (bool) {
        return _nodes[node].jailed;
    }

    /// @inheritdoc IStaking
    function unitsAt(address node, uint256 time) external view returns (uint256) {
        Node storage n = _nodes[node];
        return _boundary(_active(n) / UNIT, n.past, n.since, time);
    }

    /// @inheritdoc IStaking
    function totalUnitsAt(uint256 time) external view returns (uint256) {
        Total memory total = _total;
        return _boundary(total.units, total.past, total.since, time);
    }

    // Weights

    function _active(Node storage n) private view returns (uint256) {
        return n.jailed || n.model == 0 ? 0 : n.stake - n.leaving;
    }

    /// Notes that the weight of a node that serves was `before` until now, and is `current`. One that serves nothing has none.
    function _reweigh(Node storage n, uint256 before, uint256 current) private {
        bytes32 model = n.model;
        if (model == 0 || current == before) return;
        // No overflow: `before` is a part of the sum (S3), and all stakes together are less than the token's cap.
        unchecked {
            weights[model] = weights[model] - before + current;
        }
        _count(n, before / UNIT, current / UNIT);
    }

    /// Notes that the node had `before` units until now, and has `current`.
    function _count(Node storage n, uint256 before, uint256 current) private {
        if (current == before) return;
        uint256 epoch = block.timestamp / EPOCH;
        (n.past, n.since) = (_remember(n.past, n.since, before, epoch), uint32(epoch));
        Total storage total = _total;
        uint256 units = total.units;
        uint152 past = _remember(total.past, total.since, units, epoch);
        // Neither overflow nor truncation: `before` is a part of the sum (S7), and all units are at most CAP / UNIT.
        unchecked {
            units = units - before + current;
        }
        (total.units, total.since, total.past) = (uint24(units), uint32(epoch), past);
    }

    /// `past` with `units`, which held since epoch `since`, as the value at every epoch's beginning from there to `epoch`.
    function _remember(uint256 past, uint256 since, uint256 units, uint256 epoch) private pure returns (uint152) {
        // No overflow: time does not run backwards, and units fit in BITS.
        unchecked {
            uint256 width = BITS * (epoch - since);
            // A one at the lowest bit of each missing boundary: of all, if they are more than the bits of a word.
            uint256 missing = ONES & ((1 << width) - 1);
            // What is shifted out is forgotten.
            return uint152(past << width | units * missing);
        }
    }

    /// The units at the beginning of `time`'s epoch, out of those now and those remembered.
    function _boundary(uint256 current, uint256 past, uint256 since, uint256 time) private view returns (uint256) {
        (uint256 epoch, uint256 newest) = (time / EPOCH, block.timestamp / EPOCH);
        require(since < epoch + BOUNDARIES && epoch <= newest, UnknownEpoch(epoch, since, newest));
        return epoch > since ? current : (past >> BITS * (since - epoch)) & ((1 << BITS) - 1);
    }
}
