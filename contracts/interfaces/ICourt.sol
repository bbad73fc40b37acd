// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IBeacon} from "./IBeacon.sol";
import {IStaking} from "./IStaking.sol";
import {IToken} from "./IToken.sol";

/// @notice What a node signs for a window of rows, in Staking's EIP-712 domain ("Tallystick", "1").
/// @param time `at` in the type string: as an identifier that is about to become a keyword.
struct Receipt {
    address node;
    bytes32 model;
    bytes32 numericClass;
    bytes32 session;
    uint32 attempt;
    uint16 start;
    uint16 end;
    uint32 first;
    uint32 last;
    uint32 revision;
    bytes32 context;
    bytes32 input;
    bytes32 output;
    bytes32 previous;
    bytes32 challenge;
    bytes32 sketches;
    uint48 time;
}

/// @notice None: no such case. Open: waits for the seed block's header. Drawn: has its seats, and times for what follows.
/// Ruled: has its verdict, and what follows from it for the receipt, the session and the next case; no money has moved.
/// Enforced: the accused is slashed and free, the parties are paid.
enum State {
    None,
    Open,
    Drawn,
    Ruled,
    Enforced
}

enum Vote {
    None,
    Guilty,
    Clear,
    Fault,
    Unreadable,
    Abstain
}

/// @notice Missed: fewer than half of the expected seats voted; as a ruling, in every round. Void: they did not agree, or fewer
/// than half said anything but abstain.
enum Verdict {
    Missed,
    Void,
    Guilty,
    Clear,
    Fault,
    Unreadable
}

/// @notice What a node's convictions and faults leave behind. Times of rulings, 0 for never.
/// @param slashedBps what was slashed since the last EVIDENCE without a slash, in 1/10,000.
struct Record {
    uint48 convictedAt;
    uint48 faultAt;
    uint48 slashedAt;
    uint16 slashedBps;
}

/// @param accuser who gets the bond back.
/// @param openedAt its epoch's beginning decides how many units everybody has in this case.
/// @param signedAt the receipt's `at`.
/// @param purse until it is enforced the accuser's bond, then what each seat gets that voted as the verdict says.
/// @param verdict before the ruling that of the last round that was appealed, Missed if none was.
/// @param units all units outside the accused's.
/// @param seedBlock its prevrandao is this round's seed.
/// @param commitEnd until when this round's seats may commit.
/// @param tally this round's seats by vote, 16 bits each, guilty lowest, in the order of `Vote`.
/// @param slashBps the part of the stake that the ruling takes, in 1/10,000.
/// @param unitBps what a seat's fine is a thousandth of, in 1/10,000 of Staking's UNIT.
/// @param beacon the number of the beacon that tells its seeds.
/// @param earlier the tallies of the rounds before, added up.
struct Case {
    address accuser;
    uint48 openedAt;
    uint48 signedAt;
    address accused;
    uint96 purse;
    State state;
    Verdict verdict;
    uint8 round;
    uint24 units;
    uint40 seedBlock;
    uint40 commitEnd;
    uint80 tally;
    uint16 slashBps;
    uint16 unitBps;
    uint16 beacon;
    uint80 earlier;
}

/// @param commitment the first 26 bytes of what was committed.
/// @param seats that the juror committed for.
/// @param fined seats beyond those, for which its silence was reported.
struct Ballot {
    bytes26 commitment;
    uint16 seats;
    uint16 fined;
    Vote vote;
    bool settled;
}

/// @param against the verdict that it disputes.
struct Appeal {
    address by;
    Verdict against;
}

/// @notice Delays in seconds, LOOKAHEAD and HEADERS in blocks; see docs/court.md.
struct Terms {
    uint256 evidence;
    uint256 commit;
    uint256 reveal;
    uint256 appeal;
    uint256 relapse;
    uint256 lookahead;
    uint256 headers;
    uint256 minUnits;
}

/// @title Disputes over receipts: a jury drawn by stake recomputes what a node signed
interface ICourt {
    event Opened(
        bytes32 indexed id,
        address indexed accused,
        address indexed accuser,
        bytes32 receipt,
        bytes32 evidence,
        uint256 bond
    );
    /// @notice A round waits for the header of `seedBlock`.
    event Seeding(bytes32 indexed id, uint256 round, uint256 seedBlock);
    event Drawn(bytes32 indexed id, uint256 round, bytes32 seed, uint256 seats, uint256 units, uint256 commitEnd);
    event Committed(bytes32 indexed id, uint256 round, address indexed juror, uint256 seats);
    /// @param roots digest over what the juror recomputed, bound by its commitment.
    event Revealed(bytes32 indexed id, uint256 round, address indexed juror, Vote vote, uint256 seats, bytes32 roots);
    event Appealed(bytes32 indexed id, uint256 round, address indexed by, Verdict against, uint256 bond);
    /// @param slashBps the part of the accused's stake that is due, in 1/10,000.
    event Ruled(bytes32 indexed id, address indexed accused, Verdict verdict, uint256 slashBps);
    /// @param share what each seat gets that voted as the verdict says.
    event Enforced(bytes32 indexed id, uint256 slashed, uint256 bounty, uint256 share);
    event Settled(bytes32 indexed id, uint256 round, address indexed juror, uint256 paid, uint256 fined);
    event RatesSet(uint256 bondBps, uint256 unitBps);
    event BeaconSet(uint256 indexed number, IBeacon beacon);
    event Silent(bytes32 indexed id, uint256 round, address indexed juror, uint256 seats);

    error TooShortUnbonding(uint256 unbonding, uint256 needed);
    error TooLongTrial(uint256 trial, uint256 remembered);
    error NotGovernor(address caller, address governor);
    error OutOfBounds(uint256 rate, uint256 least, uint256 most);
    error NoBeacon(address given);
    error NotSigned(address signer, address node);
    error OutOfTime(uint256 time, uint256 from, uint256 until);
    error CaseKnown(bytes32 id);
    error ReceiptClosed(bytes32 receipt);
    error SessionClosed(address node, bytes32 session);
    error TooFewUnits(uint256 units, uint256 minimum);
    error NothingToWin(address node);
    error WrongState(State state, State expected);
    error HeaderAvailable(uint256 number, uint256 until);
    error LastRound(uint256 round);
    error QuorumMet(uint256 round);
    error QuorumMissed(uint256 round);
    error NotDrawn(uint256 round);
    error IsAccused(address node);
    error BadSeats();
    error NoSeat(address juror, uint256 unit);
    error HasCommitted(address juror);
    error WrongReveal(address juror);
    error NotRevealed(address juror);
    error HasSettled(address juror);
    error NotSilent(address juror, uint256 seats);

    function STAKING() external view returns (IStaking);

    function TOKEN() external view returns (IToken);

    /// @notice The timelock, the one address that may call `setRates` and `setBeacon`.
    function GOVERNOR() external view returns (address);

    /// @notice Seconds after a receipt's `at` in which a case can be opened.
    function EVIDENCE() external view returns (uint256);

    /// @notice Seconds for commitments, from the draw on.
    function COMMIT() external view returns (uint256);

    /// @notice Seconds for reveals, from the end of the commitments on.
    function REVEAL() external view returns (uint256);

    /// @notice Seconds for an appeal, from the end of the reveals on.
    function APPEAL() external view returns (uint256);

    /// @notice Seconds in which a second fault counts as a conviction.
    function RELAPSE() external view returns (uint256);

    /// @notice Blocks from the beginning of a round to its seed block.
    function LOOKAHEAD() external view returns (uint256);

    /// @notice Blocks for which the chain remembers hashes.
    function HEADERS() external view returns (uint256);

    /// @notice The least units outside the accused's for which there is a Court.
    function MIN_UNITS() external view returns (uint256);

    /// @notice For cases opened from now on: `bondBps`, the bond as a part of the slash that it may bring, 1,250 to 5,000 (twice
    /// the bounty); `unitBps`, what a seat's fine is a thousandth of, as a part of Staking's UNIT, 2,500 to 40,000. In 1/10,000. Only the
    /// governor.
    function setRates(uint256 bondBps, uint256 unitBps) external;

    /// @notice Names the beacon of cases opened from now on. Only the governor.
    function setBeacon(IBeacon next) external;

    /// @notice Accuses the node of a wrong receipt, for a bond of the caller's: `bondFor`, doubled `doublings` times. The node's
    /// stake is held until the ruling is enforced.
    /// @param signature of the node's hot key over the receipt, 65 bytes.
    /// @param evidence the SHA-256 digest in the CID of what jurors need, see docs/court.md.
    /// @return id `caseId(digest of the receipt, evidence)`.
    function open(Receipt calldata receipt, bytes calldata signature, bytes32 evidence) external returns (bytes32 id);

    /// @notice Draws the round's seats.
    /// @param header the seed block's, as RLP.
    function draw(bytes32 id, bytes calldata header) external;

    /// @notice Names another seed block when nobody has shown the last one's header while the chain knew its hash.
    function retarget(bytes32 id) external;

    /// @notice Begins the next round when too few seats voted in this one.
    function redraw(bytes32 id) external;

    /// @notice Takes seats, and commits to a vote. Caller: a node or one of its hot keys.
    /// @param seats the node's winning units, ascending; those left out can be reported as silent.
    /// @param commitment `keccak256(abi.encode(id, round, node, vote, roots, salt))`.
    function commit(bytes32 id, uint256[] calldata seats, bytes32 commitment) external;

    /// @notice Opens a juror's commitment. Anybody who knows the salt may.
    function reveal(bytes32 id, address juror, Vote vote, bytes32 roots, bytes32 salt) external;

    /// @notice Disputes the round's verdict, for `appealBond` of the caller's. A larger jury decides anew.
    function appeal(bytes32 id) external;

    /// @notice Ends the case: closes the receipt or the session, records a fault or a conviction, and says what part of the stake
    /// that takes. If the last round missed its quorum, the last verdict before it holds, and without one it is Missed. So it is,
    /// too, when a round was not drawn for four EVIDENCE.
    /// @param receipt digest of the receipt.
    function rule(bytes32 receipt, bytes32 evidence) external returns (Verdict verdict);

    /// @notice Carries out a ruling, whoever calls: slash, bounty, bonds, damages, and the pot of the jurors; ends the hold.
    function enforce(bytes32 id) external;

    /// @notice After that, pays a juror's ballot to its payee, or fines it for the opposite of the verdict. Fines burn.
    function settle(bytes32 id, uint256 round, address juror) external;

    /// @notice Fines a node for winning units that it revealed no vote for. Fines burn. In parts or at once.
    /// @param seats winning units, ascending; more than the juror revealed and was fined for.
    function report(bytes32 id, uint256 round, address juror, uint256[] calldata seats) external;

    function cases(bytes32 id) external view returns (Case memory);

    function ballots(bytes32 id, uint256 round, address juror) external view returns (Ballot memory);

    /// @notice The appeal against a round's verdict, zero if there is none.
    function appeals(bytes32 id, uint256 round) external view returns (Appeal memory);

    function records(address node) external view returns (Record memory);

    /// @notice The round's seed, zero before its draw.
    function seeds(bytes32 id, uint256 round) external view returns (bytes32);

    /// @notice What `setRates` set last; 5,000 and 10,000 before.
    function rates() external view returns (uint256 bondBps, uint256 unitBps);

    /// @notice The beacon of a case opened now.
    function beacon() external view returns (IBeacon);

    /// @notice All beacons so far, from 0; a case names its own.
    function beacons(uint256 number) external view returns (IBeacon);

    /// @notice Was there a ruling on the merits of this receipt?
    function receiptClosed(bytes32 receipt) external view returns (bool);

    /// @notice How often the bond of the next case over this receipt is doubled: once for each case before, up to three times.
    function doublings(bytes32 receipt) external view returns (uint256);

    /// @notice `keccak256(abi.encode(receipt, evidence))`
    function caseId(bytes32 receipt, bytes32 evidence) external pure returns (bytes32);

    /// @notice The EIP-712 digest that the node signed.
    function digestOf(Receipt calldata receipt) external view returns (bytes32);

    /// @notice Seats that a round is expected to have: 15, 31, 61.
    function seatsOf(uint256 round) external pure returns (uint256);

    /// @notice The bond for accusing the node now of a receipt signed at `signedAt`, for the first time; 0 when nothing could be
    /// won.
    function bondFor(address node, uint256 signedAt) external view returns (uint256);

    /// @notice What an appeal against the current round's verdict costs.
    function appealBond(bytes32 id) external view returns (uint256);

    /// @notice How the current round stands, or stood.
    function standing(bytes32 id) external view returns (Verdict);

    /// @notice Does this unit of a node win a seat in a round?
    function wins(bytes32 id, uint256 round, address juror, uint256 unit) external view returns (bool);
}
