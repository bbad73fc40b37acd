// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IModels} from "./IModels.sol";
import {IToken} from "./IToken.sol";

/// @notice One address = one stake = one model = one span of layers. The address is the owner's cold key.
/// @param stake all that lies here for the node, in token base units.
/// @param leaving the part of `stake` that is unbonding: slashable, but no security. leaving <= stake.
/// @param leaveAt when `leaving` may be withdrawn, in seconds.
/// @param holds number of open cases; while it is not zero nothing can be withdrawn.
/// @param jailed silent for too long: no weight until it beats.
/// @param start first layer served; [start, end) is half-open.
/// @param seenAt its last beat or `serve`, in seconds.
/// @param since the last epoch in which the node's units changed.
/// @param past its units at the beginning of epoch `since` in the lowest 21 bits, of the six epochs before in the next ones.
struct Node {
    uint96 stake;
    uint96 leaving;
    uint40 leaveAt;
    uint16 holds;
    bool jailed;
    uint16 start;
    uint16 end;
    uint40 seenAt;
    uint32 since;
    uint152 past;
    bytes32 model;
    address payee;
}

/// @title The registry of nodes and their stake
/// @notice A node's owner stakes, binds hot keys and says what the node serves. Only the slasher (the Court) can hold or slash.
/// A node's weight is its active stake, `stake - leaving`, while it serves a model and is not jailed.
interface IStaking {
    /// @notice Who paid is told by the token, in its transfer.
    event Staked(address indexed node, uint256 amount, uint256 stake);
    event SignerBound(address indexed node, address indexed signer);
    event PayeeSet(address indexed node, address indexed payee);
    /// @notice The node's latest word on what it serves. Price and endpoint are hints: a signed offer is binding.
    /// @param operator whom the node declares to belong to; auditors are chosen of another one. Self-declared, proves nothing.
    /// @param price token base units per position and layer.
    event Serving(
        address indexed node,
        bytes32 indexed model,
        uint16 start,
        uint16 end,
        address operator,
        uint256 price,
        bytes endpoint
    );
    event Unbonding(address indexed node, uint256 amount, uint256 leaving, uint256 leaveAt);
    event Withdrawn(address indexed node, uint256 amount);
    /// @notice A beat, or a `serve`, has freed the node; other beats leave no trace but `seenAt`.
    event Freed(address indexed node);
    /// @param seenAt the node's last sign of life, in seconds.
    event Jailed(address indexed node, address indexed by, uint256 seenAt);
    event HoldSet(address indexed node, uint256 holds);
    event Slashed(address indexed node, uint256 amount, uint256 bounty, address indexed to);

    error NotSlasher(address caller, address slasher);
    error NotReady(uint256 time, uint256 readyAt);
    error TooMuch(uint256 amount, uint256 available);
    error TooLittle(uint256 active, uint256 minimum);
    error BadRange(uint256 start, uint256 end, uint256 layers);
    error EndpointTooLong(uint256 length, uint256 maximum);
    error NotServing(address node);
    error InJail(address node);
    error Held(uint256 holds);
    error NotHeld(address node);
    error KeyTaken(address signer, address node);
    error Expired(uint256 time, uint256 deadline);
    error BadProof(address recovered, address signer);
    error UnknownEpoch(uint256 epoch, uint256 changed, uint256 newest);
    error TooManyUnits(uint256 units, uint256 maximum);
    error TooShortStale(uint256 stale, uint256 epoch);

    function TOKEN() external view returns (IToken);

    function MODELS() external view returns (IModels);

    /// @notice The one address that may hold and slash.
    function SLASHER() external view returns (address);

    /// @notice The least active stake of a serving node, in token base units.
    function MIN_STAKE() external view returns (uint256);

    /// @notice The active stake for which seats are drawn: half of `MIN_STAKE`.
    function UNIT() external view returns (uint256);

    /// @notice Seconds between `unbond` and `withdraw`. At least the time in which a fault can be proved and ruled on.
    function UNBONDING() external view returns (uint256);

    /// @notice Seconds per epoch. Epoch e is [e * EPOCH, (e + 1) * EPOCH).
    function EPOCH() external view returns (uint256);

    /// @notice Seconds of silence after which a serving node can be jailed. More than an epoch, the time between two beats.
    function STALE() external view returns (uint256);

    /// @notice Adds `amount` of the caller's tokens to `node`'s stake. Anybody may; it cannot be taken back by the giver.
    function stake(address node, uint256 amount) external;

    /// @notice Binds a hot key to the caller, for good: what it signs stays the node's even after other keys are bound.
    /// A node may have several.
    /// @param signature the signer's, 65 bytes (r, s, v), over `Bind(address node,uint256 deadline)` in this contract's
    /// EIP-712 domain ("Tallystick", "1"): proof that the key is its own, so that nobody can squat a rival's.
    function bind(address signer, uint256 deadline, bytes calldata signature) external;

    /// @notice Where the node's earnings go; zero for the node's own address.
    function setPayee(address payee) external;

    /// @notice Declares what the caller's node serves, replacing what it declared before. Counts as a beat.
    /// @param price token base units per position and layer; only in the event.
    /// @param endpoint how to reach the node, at most 256 bytes; only in the event.
    /// @param operator see the event.
    function serve(
        bytes32 model,
        uint16 start,
        uint16 end,
        uint256 price,
        bytes calldata endpoint,
        address operator
    ) external;

    /// @notice Begins to take out `amount` of the caller's stake. Every call restarts the delay for all that is leaving.
    /// What stays must be nothing or at least `MIN_STAKE`.
    function unbond(uint256 amount) external;

    /// @notice Pays out what is leaving to the caller, from `leaveAt` on and while no case is open.
    function withdraw() external;

    /// @notice Says that the node lives, and frees it from jail. Caller: a hot key of the node, or its owner. From an EPOCH
    /// after the last sign of life on; at any time when jailed.
    function beat() external;

    /// @notice Takes the weight of a node that serves, and that nobody has seen for STALE, until it beats. Anybody may. Its
    /// stake stays whole; its units count until the epoch ends.
    function jail(address node) external;

    /// @notice Blocks (`on`) withdrawal for one more open case, or releases one. Only the slasher.
    function hold(address node, bool on) external;

    /// @notice Takes `min(amount, stake)`: pays `min(bounty, half of it)` to `to`, burns the rest. Only the slasher.
    /// @return taken what the stake lost.
    function slash(address node, uint256 amount, uint256 bounty, address to) external returns (uint256 taken);

    /// @notice The whole state of a node, all zero when unknown.
    function nodes(address node) external view returns (Node memory);

    /// @notice All that lies here for the node, leaving or not.
    function stakeOf(address node) external view returns (uint256);

    /// @notice The node that a hot key signs for, zero when unbound.
    function nodeOf(address signer) external view returns (address node);

    /// @notice Where to pay the node's earnings.
    function payeeOf(address node) external view returns (address);

    /// @notice The node's weight now: its stake that is not leaving; 0 while it serves no model or is jailed.
    function active(address node) external view returns (uint256);

    function isJailed(address node) external view returns (bool);

    /// @notice The sum of the weights of all nodes of a model, now. A client checks that the nodes it found add up to it.
    function weights(bytes32 model) external view returns (uint256);

    /// @notice The node's units, `active / UNIT`, at the beginning of `time`'s epoch, whatever model it served. Stake
    /// that came within the epoch does not count; stake that left since does.
    /// @dev Seven boundaries are remembered, so that nobody makes a juror's unknown by staking for it: reverts with
    /// UnknownEpoch for those more than six epochs before the last change, and for the future.
    function unitsAt(address node, uint256 time) external view returns (uint256);

    /// @notice The sum of all nodes' `unitsAt`.
    /// @dev Reverts like `unitsAt`.
    function totalUnitsAt(uint256 time) external view returns (uint256);
}
