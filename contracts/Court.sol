// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {IBeacon} from "./interfaces/IBeacon.sol";
import {Appeal, Ballot, Case, ICourt, Receipt, Record, State, Terms, Verdict, Vote} from "./interfaces/ICourt.sol";
import {IStaking} from "./interfaces/IStaking.sol";
import {IToken} from "./interfaces/IToken.sol";

/// @dev Invariants:
/// (C1) a receipt has one ruling on its merits, a node one conviction per session;
/// (C2) the token balance is the bonds of open cases and their appeals, and what jurors have not been paid yet (plus
/// what strangers send here by mistake): bonds in = bonds out + pots + burned;
/// (C3) a node's holds are its cases that are not enforced yet;
/// (C4) nobody has more seats than units, and the accused has none;
/// (C5) nobody is slashed without two thirds of the votes on the merits (all but abstentions), and those are of at least
/// half of the expected seats, and once for a conviction; what the rulings of any EVIDENCE slash is at most CAP_BPS;
/// (C6) a case has at most three rounds; once drawn, each ends by time alone, and one that is never drawn can be ruled;
/// (C7) fines burn whole: nobody gains by another's silence or error;
/// (C8) the governor moves bond and unit within ROOM and names the next beacon, and nothing else; a case keeps to its end
/// the bond, the unit and the beacon that it was opened with.
///
/// TOKEN and STAKING are our own and call nobody else, and a beacon is only asked to look: there is no reentrancy to guard
/// against.
contract Court is ICourt {
    /// @dev What happened in a session of a node.
    enum Offence {
        None,
        Fault,
        Convicted
    }

    /// @dev cases: how often the receipt was accused, up to MAX_DOUBLINGS. offence: the first 30 bytes of keccak256 of node
    /// and session; two of them that collide cost 2^120.
    struct Docket {
        bool closed;
        uint8 cases;
        bytes30 offence;
    }

    /// @dev What the governor sets, for cases opened from then on; beacon: its number.
    struct Rates {
        uint16 bondBps;
        uint16 unitBps;
        uint16 beacon;
    }

    bytes32 private constant RECEIPT_TYPEHASH = keccak256(
        "Receipt(address node,bytes32 model,bytes32 numericClass,bytes32 session,uint32 attempt,uint16 start,"
        "uint16 end,uint32 first,uint32 last,uint32 revision,bytes32 context,bytes32 input,bytes32 output,bytes32 previous,"
        "bytes32 challenge,bytes32 sketches,uint48 at)"
    );
    uint256 private constant BPS = 10_000;
    uint256 private constant FIRST_BPS = 100;
    uint256 private constant REPEAT_BPS = 1000;
    uint256 private constant CAP_BPS = 3000;
    uint256 private constant LAST_ROUND = 2;
    /// @dev At first, and at most, half of the slash: twice the bounty.
    uint256 private constant BOND_BPS = 5000;
    uint256 private constant UNIT_BPS = BPS;
    /// @dev The governor moves neither by more than this factor.
    uint256 private constant ROOM = 4;
    /// @dev A seat's fine is a thousandth of what it answers with, in however many addresses the stake lies.
    uint256 private constant FINE_PART = 1000;
    /// @dev The part of the bond that pays the jurors of a case without a loser.
    uint256 private constant FEE_PART = 10;
    /// @dev Each further case over a receipt doubles the bond, so often at most.
    uint256 private constant MAX_DOUBLINGS = 3;
    /// @dev After so many EVIDENCE without a draw a case is ruled as it stands.
    uint256 private constant PATIENCE = 4;
    uint256 private constant FOREVER = type(uint256).max;

    IStaking public immutable STAKING;
    IToken public immutable TOKEN;
    address public immutable GOVERNOR;
    uint256 public immutable EVIDENCE;
    uint256 public immutable COMMIT;
    uint256 public immutable REVEAL;
    uint256 public immutable APPEAL;
    uint256 public immutable RELAPSE;
    uint256 public immutable LOOKAHEAD;
    uint256 public immutable HEADERS;
    uint256 public immutable MIN_UNITS;
    uint256 private immutable UNIT;

    mapping(bytes32 id => Case) private _cases;
    mapping(bytes32 id => mapping(uint256 round => mapping(address juror => Ballot))) private _ballots;
    mapping(bytes32 id => mapping(uint256 round => Appeal)) private _appeals;
    mapping(bytes32 id => mapping(uint256 round => bytes32)) public seeds;
    mapping(bytes32 receipt => Docket) private _dockets;
    mapping(bytes30 offence => Offence) private _offences;
    mapping(address node => Record) private _records;
    mapping(uint256 number => IBeacon) public beacons;
    Rates private _rates;

    constructor(IStaking staking, IBeacon first, address governor, Terms memory terms) {
        STAKING = staking;
        TOKEN = staking.TOKEN();
        GOVERNOR = governor;
        EVIDENCE = terms.evidence;
        COMMIT = terms.commit;
        REVEAL = terms.reveal;
        APPEAL = terms.appeal;
        RELAPSE = terms.relapse;
        LOOKAHEAD = terms.lookahead;
        HEADERS = terms.headers;
        MIN_UNITS = terms.minUnits;
        UNIT = staking.UNIT();
        _rates = Rates(uint16(BOND_BPS), uint16(UNIT_BPS), 0);
        beacons[0] = first;
        uint256 trial = (LAST_ROUND + 1) * (COMMIT + REVEAL) + LAST_ROUND * APPEAL;
        (uint256 unbonding, uint256 remembered) = (staking.UNBONDING(), 6 * staking.EPOCH());
        require(unbonding >= EVIDENCE + trial, TooShortUnbonding(unbonding, EVIDENCE + trial));
        // A day more than the trial: its rounds wait for headers.
        trial += staking.EPOCH();
        require(trial <= remembered, TooLongTrial(trial, remembered));
    }

    modifier onlyGovernor() {
        require(msg.sender == GOVERNOR, NotGovernor(msg.sender, GOVERNOR));
        _;
    }

    // The governor

    /// @inheritdoc ICourt
    function setRates(uint256 bondBps, uint256 unitBps) external onlyGovernor {
        _checkRate(bondBps, BOND_BPS / ROOM, BOND_BPS);
        _checkRate(unitBps, UNIT_BPS / ROOM, UNIT_BPS * ROOM);
        (_rates.bondBps, _rates.unitBps) = (uint16(bondBps), uint16(unitBps));
        emit RatesSet(bondBps, unitBps);
    }

    /// @inheritdoc ICourt
    function setBeacon(IBeacon next) external onlyGovernor {
        require(address(next).code.length != 0, NoBeacon(address(next)));
        uint16 number = _rates.beacon + 1;
        _rates.beacon = number;
        beacons[number] = next;
        emit BeaconSet(number, next);
    }

    // The parties

    /// @inheritdoc ICourt
    function open(Receipt calldata receipt, bytes calldata signature, bytes32 evidence) external returns (bytes32 id) {
        (address accused, bytes32 digest) = (receipt.node, digestOf(receipt));
        _checkSigned(accused, digest, signature);
        _checkTime(receipt.time, receipt.time + EVIDENCE);
        id = caseId(digest, evidence);
        Case storage c = _cases[id];
        require(c.state == State.None, CaseKnown(id));
        Docket storage docket = _dockets[digest];
        require(!docket.closed, ReceiptClosed(digest));
        bytes30 offence = bytes30(keccak256(abi.encode(accused, receipt.session)));
        require(_offences[offence] != Offence.Convicted, SessionClosed(accused, receipt.session));
        // No truncation: all units together are fewer than 2^24, and a bond is less than the token's cap.
        uint256 units = STAKING.totalUnitsAt(block.timestamp) - STAKING.unitsAt(accused, block.timestamp);
        require(units >= MIN_UNITS, TooFewUnits(units, MIN_UNITS));
        uint8 before = docket.cases;
        uint256 bond = bondFor(accused, receipt.time) << before;
        require(bond != 0, NothingToWin(accused));
        (docket.cases, docket.offence) = (before < MAX_DOUBLINGS ? before + 1 : before, offence);

        (c.accuser, c.openedAt, c.signedAt) = (msg.sender, uint48(block.timestamp), receipt.time);
        (c.accused, c.purse) = (accused, uint96(bond));
        (c.units, c.unitBps, c.beacon) = (uint24(units), _rates.unitBps, _rates.beacon);
        emit Opened(id, accused, msg.sender, digest, evidence, bond);
        _seed(id, c);
        STAKING.hold(accused, true);
        TOKEN.transferFrom(msg.sender, address(this), bond);
    }

    /// @inheritdoc ICourt
    function appeal(bytes32 id) external {
        Case storage c = _inState(id, State.Drawn);
        uint256 round = c.round;
        require(round < LAST_ROUND, LastRound(round));
        uint256 revealEnd = c.commitEnd + REVEAL;
        _checkTime(revealEnd, revealEnd + APPEAL);
        Verdict verdict = _standing(c);
        require(verdict != Verdict.Missed, QuorumMissed(round));
        uint256 bond = _appealBond(c.purse, round);
        _appeals[id][round] = Appeal(msg.sender, verdict);
        c.verdict = verdict;
        emit Appealed(id, round, msg.sender, verdict, bond);
        _nextRound(id, c);
        TOKEN.transferFrom(msg.sender, address(this), bond);
    }

    // Seeds

    /// @inheritdoc ICourt
    function draw(bytes32 id, bytes calldata header) external {
        Case storage c = _inState(id, State.Open);
        uint256 round = c.round;
        // Cases that share a block differ by their id.
        bytes32 seed = keccak256(abi.encode(beacons[c.beacon].randao(c.seedBlock, header), id, round));
        uint40 commitEnd = uint40(block.timestamp + COMMIT);
        seeds[id][round] = seed;
        (c.state, c.commitEnd) = (State.Drawn, commitEnd);
        emit Drawn(id, round, seed, seatsOf(round), c.units, commitEnd);
    }

    /// @inheritdoc ICourt
    function retarget(bytes32 id) external {
        Case storage c = _inState(id, State.Open);
        uint256 until = c.seedBlock + HEADERS;
        require(block.number > until, HeaderAvailable(c.seedBlock, until));
        _seed(id, c);
    }

    /// @inheritdoc ICourt
    function redraw(bytes32 id) external {
        Case storage c = _inState(id, State.Drawn);
        require(c.round < LAST_ROUND, LastRound(c.round));
        _checkTime(c.commitEnd + REVEAL, FOREVER);
        require(_standing(c) == Verdict.Missed, QuorumMet(c.round));
        _nextRound(id, c);
    }

    // Jurors

    /// @inheritdoc ICourt
    function commit(bytes32 id, uint256[] calldata seats, bytes32 commitment) external {
        Case storage c = _inState(id, State.Drawn);
        _checkTime(0, c.commitEnd);
        (uint256 round, address juror) = (c.round, _juror());
        Ballot storage ballot = _ballots[id][round][juror];
        require(ballot.seats == 0, HasCommitted(juror));
        _checkSeats(id, c, round, juror, seats);
        // 208 bits of a hash are enough to bind: a collision costs 2^104.
        _ballots[id][round][juror] = Ballot(bytes26(commitment), uint16(seats.length), 0, Vote.None, false);
        emit Committed(id, round, juror, seats.length);
    }

    /// @inheritdoc ICourt
    function reveal(bytes32 id, address juror, Vote vote, bytes32 roots, bytes32 salt) external {
        Case storage c = _inState(id, State.Drawn);
        _checkTime(c.commitEnd, c.commitEnd + REVEAL);
        uint256 round = c.round;
        Ballot memory ballot = _ballots[id][round][juror];
        bytes32 commitment = keccak256(abi.encode(id, round, juror, vote, roots, salt));
        // No check of the caller: who knows the salt has it from the juror. A second reveal fails here, too.
        require(vote != Vote.None && ballot.commitment == bytes26(commitment), WrongReveal(juror));
        (ballot.commitment, ballot.vote) = (0, vote);
        _ballots[id][round][juror] = ballot;
        // No overflow into the next vote: the seats of a round are about 61 at most, never 2^16.
        c.tally += uint80(ballot.seats) << 16 * (uint8(vote) - 1);
        emit Revealed(id, round, juror, vote, ballot.seats, roots);
    }

    // The ruling

    /// @inheritdoc ICourt
    function rule(bytes32 receipt, bytes32 evidence) external returns (Verdict verdict) {
        bytes32 id = caseId(receipt, evidence);
        Case storage c = _cases[id];
        if (c.state == State.Open) {
            _checkTime((c.round == 0 ? c.openedAt : c.commitEnd) + PATIENCE * EVIDENCE, FOREVER);
        } else {
            _inState(id, State.Drawn);
            bool last = c.round == LAST_ROUND;
            _checkTime(c.commitEnd + REVEAL + (last ? 0 : APPEAL), FOREVER);
            verdict = _standing(c);
            require(verdict != Verdict.Missed || last, QuorumMissed(c.round));
        }
        // What the last round with a quorum said, if this one says nothing.
        if (verdict == Verdict.Missed) verdict = c.verdict;
        uint16 slashBps = _convict(c, verdict, receipt);
        (c.state, c.verdict, c.slashBps) = (State.Ruled, verdict, slashBps);
        emit Ruled(id, c.accused, verdict, slashBps);
    }

    /// @inheritdoc ICourt
    function enforce(bytes32 id) external {
        Case storage c = _inState(id, State.Ruled);
        c.state = State.Enforced;
        (address accused, uint256 slashed) = (c.accused, 0);
        if (c.slashBps != 0) {
            uint256 amount = STAKING.stakeOf(accused) * c.slashBps / BPS;
            // Half of it burns, half comes here.
            slashed = STAKING.slash(accused, amount, amount / 2, address(this));
        }
        STAKING.hold(accused, false);
        _pay(id, c, slashed);
    }

    /// @inheritdoc ICourt
    function settle(bytes32 id, uint256 round, address juror) external {
        Case storage c = _inState(id, State.Enforced);
        Ballot storage ballot = _ballots[id][round][juror];
        (Vote vote, uint256 seats, Verdict verdict) = (ballot.vote, ballot.seats, c.verdict);
        require(vote != Vote.None, NotRevealed(juror));
        require(!ballot.settled, HasSettled(juror));
        ballot.settled = true;
        uint256 pay = _agrees(vote, verdict) ? seats * c.purse : 0;
        uint256 fine = _opposes(vote, verdict) ? seats * _fine(c) : 0;
        emit Settled(id, round, juror, pay, fine);
        if (pay != 0) TOKEN.transfer(STAKING.payeeOf(juror), pay);
        if (fine != 0) STAKING.slash(juror, fine, 0, address(0));
    }

    /// @inheritdoc ICourt
    function report(bytes32 id, uint256 round, address juror, uint256[] calldata seats) external {
        Case storage c = _cases[id];
        require(seeds[id][round] != 0, NotDrawn(round));
        if (round == c.round) _checkTime(c.commitEnd + REVEAL, FOREVER);
        Ballot storage ballot = _ballots[id][round][juror];
        uint256 known = ballot.fined + (ballot.vote == Vote.None ? 0 : ballot.seats);
        require(seats.length > known, NotSilent(juror, known));
        _checkSeats(id, c, round, juror, seats);
        uint256 silent = seats.length - known;
        ballot.fined += uint16(silent);
        emit Silent(id, round, juror, silent);
        // Nothing for who reports it: silence can be provoked by cases about nothing.
        STAKING.slash(juror, silent * _fine(c), 0, address(0));
    }

    // Views

    /// @inheritdoc ICourt
    function cases(bytes32 id) external view returns (Case memory) {
        return _cases[id];
    }

    /// @inheritdoc ICourt
    function ballots(bytes32 id, uint256 round, address juror) external view returns (Ballot memory) {
        return _ballots[id][round][juror];
    }

    /// @inheritdoc ICourt
    function appeals(bytes32 id, uint256 round) external view returns (Appeal memory) {
        return _appeals[id][round];
    }

    /// @inheritdoc ICourt
    function records(address node) external view returns (Record memory) {
        return _records[node];
    }

    /// @inheritdoc ICourt
    function rates() external view returns (uint256 bondBps, uint256 unitBps) {
        return (_rates.bondBps, _rates.unitBps);
    }

    /// @inheritdoc ICourt
    function beacon() external view returns (IBeacon) {
        return beacons[_rates.beacon];
    }

    /// @inheritdoc ICourt
    function receiptClosed(bytes32 receipt) external view returns (bool) {
        return _dockets[receipt].closed;
    }

    /// @inheritdoc ICourt
    function doublings(bytes32 receipt) external view returns (uint256) {
        return _dockets[receipt].cases;
    }

    /// @inheritdoc ICourt
    function appealBond(bytes32 id) external view returns (uint256) {
        return _appealBond(_cases[id].purse, _cases[id].round);
    }

    /// @inheritdoc ICourt
    function standing(bytes32 id) external view returns (Verdict) {
        return _standing(_cases[id]);
    }

    /// @inheritdoc ICourt
    function wins(bytes32 id, uint256 round, address juror, uint256 unit) external view returns (bool) {
        Case storage c = _cases[id];
        bytes32 seed = seeds[id][round];
        if (seed == 0 || juror == c.accused || unit >= STAKING.unitsAt(juror, c.openedAt)) return false;
        return _wins(seed, juror, unit, _threshold(c.units, seatsOf(round)));
    }

    /// @inheritdoc ICourt
    function bondFor(address node, uint256 signedAt) public view returns (uint256) {
        return STAKING.stakeOf(node) * _slashBps(_records[node], signedAt) / BPS * _rates.bondBps / BPS;
    }

    /// @inheritdoc ICourt
    function caseId(bytes32 receipt, bytes32 evidence) public pure returns (bytes32) {
        return keccak256(abi.encode(receipt, evidence));
    }

    /// @inheritdoc ICourt
    function digestOf(Receipt calldata receipt) public view returns (bytes32) {
        bytes32 domain = MessageHashUtils.toDomainSeparator(
            0x0f, keccak256("Tallystick"), keccak256("1"), block.chainid, address(STAKING), 0
        );
        // All fields are static, so that abi.encode of the struct is EIP-712's encodeData.
        return MessageHashUtils.toTypedDataHash(domain, keccak256(abi.encode(RECEIPT_TYPEHASH, receipt)));
    }

    /// @inheritdoc ICourt
    function seatsOf(uint256 round) public pure returns (uint256) {
        return round == 0 ? 15 : round == 1 ? 31 : 61;
    }

    // Checks

    function _inState(bytes32 id, State expected) private view returns (Case storage c) {
        c = _cases[id];
        require(c.state == expected, WrongState(c.state, expected));
    }

    function _checkTime(uint256 from, uint256 until) private view {
        require(from <= block.timestamp && block.timestamp < until, OutOfTime(block.timestamp, from, until));
    }

    function _checkRate(uint256 rate, uint256 least, uint256 most) private pure {
        require(least <= rate && rate <= most, OutOfBounds(rate, least, most));
    }

    function _checkSigned(address node, bytes32 digest, bytes calldata signature) private view {
        (address signer, ECDSA.RecoverError err,) = ECDSA.tryRecoverCalldata(digest, signature);
        require(err == ECDSA.RecoverError.NoError && STAKING.nodeOf(signer) == node, NotSigned(signer, node));
        // An unbound signer is no node's, and the zero address is none.
        require(node != address(0), NotSigned(signer, node));
    }

    /// Reverts unless `seats` are winning units of the juror, each once and at least one.
    function _checkSeats(bytes32 id, Case storage c, uint256 round, address juror, uint256[] calldata seats)
        private
        view
    {
        require(juror != c.accused, IsAccused(juror));
        uint256 units = STAKING.unitsAt(juror, c.openedAt);
        (bytes32 seed, uint256 threshold) = (seeds[id][round], _threshold(c.units, seatsOf(round)));
        require(seats.length != 0, BadSeats());
        for (uint256 i = 0; i < seats.length; i++) {
            require(i == 0 || seats[i] > seats[i - 1], BadSeats());
            require(seats[i] < units && _wins(seed, juror, seats[i], threshold), NoSeat(juror, seats[i]));
        }
    }

    /// What a seat of this case is fined.
    function _fine(Case storage c) private view returns (uint256) {
        return UNIT * c.unitBps / BPS / FINE_PART;
    }

    function _juror() private view returns (address) {
        address node = STAKING.nodeOf(msg.sender);
        return node == address(0) ? msg.sender : node;
    }

    // Rounds

    function _seed(bytes32 id, Case storage c) private {
        uint40 number = uint40(block.number + LOOKAHEAD);
        (c.state, c.seedBlock) = (State.Open, number);
        emit Seeding(id, c.round, number);
    }

    function _nextRound(bytes32 id, Case storage c) private {
        (c.earlier, c.tally, c.round) = (c.earlier + c.tally, 0, c.round + 1);
        _seed(id, c);
    }

    function _threshold(uint256 units, uint256 seats) private pure returns (uint256) {
        return seats < units ? FOREVER / units * seats : FOREVER;
    }

    function _wins(bytes32 seed, address juror, uint256 unit, uint256 threshold) private pure returns (bool) {
        return uint256(keccak256(abi.encode(seed, juror, unit))) < threshold;
    }

    // Verdicts

    function _seatsFor(uint256 tally, Vote vote) private pure returns (uint256) {
        return (tally >> 16 * (uint8(vote) - 1)) & 0xffff;
    }

    function _standing(Case storage c) private view returns (Verdict) {
        uint256 tally = c.tally;
        uint256 guilty = _seatsFor(tally, Vote.Guilty);
        uint256 clear = _seatsFor(tally, Vote.Clear);
        uint256 fault = _seatsFor(tally, Vote.Fault);
        uint256 unreadable = _seatsFor(tally, Vote.Unreadable);
        uint256 voting = guilty + clear + fault + unreadable;
        if (2 * (voting + _seatsFor(tally, Vote.Abstain)) < seatsOf(c.round)) return Verdict.Missed;
        // Abstentions make a quorum, but no ruling on the merits.
        if (2 * voting < seatsOf(c.round)) return Verdict.Void;
        if (3 * guilty >= 2 * voting) return Verdict.Guilty;
        // Who found a fraud found at least a fault.
        if (3 * (guilty + fault) >= 2 * voting) return Verdict.Fault;
        if (3 * clear >= 2 * voting) return Verdict.Clear;
        if (3 * unreadable >= 2 * voting) return Verdict.Unreadable;
        return Verdict.Void;
    }

    function _agrees(Vote vote, Verdict verdict) private pure returns (bool) {
        // These take no work, so they are paid for nothing.
        if (vote == Vote.Unreadable || vote == Vote.Abstain) return false;
        if (verdict == Verdict.Guilty) return vote == Vote.Guilty;
        if (verdict == Verdict.Clear) return vote == Vote.Clear;
        if (verdict == Verdict.Fault) return vote == Vote.Fault || vote == Vote.Guilty;
        return verdict == Verdict.Void;
    }

    function _opposes(Vote vote, Verdict verdict) private pure returns (bool) {
        if (verdict == Verdict.Clear) return vote == Vote.Guilty || vote == Vote.Fault;
        return vote == Vote.Clear && (verdict == Verdict.Guilty || verdict == Verdict.Fault);
    }

    /// All seats of `tally` that share in the pot.
    function _agreeing(uint256 tally, Verdict verdict) private pure returns (uint256 seats) {
        for (uint8 vote = uint8(Vote.Guilty); vote <= uint8(Vote.Abstain); vote++) {
            if (_agrees(Vote(vote), verdict)) seats += _seatsFor(tally, Vote(vote));
        }
    }

    // Consequences

    function _slashBps(Record memory record, uint256 signedAt) private view returns (uint256) {
        bool repeated = record.convictedAt != 0 && signedAt > record.convictedAt;
        uint256 bps = repeated ? REPEAT_BPS : FIRST_BPS;
        // Slashes add up until EVIDENCE has passed without one, so that no EVIDENCE sees more than the cap.
        uint256 room = CAP_BPS - (block.timestamp < record.slashedAt + EVIDENCE ? record.slashedBps : 0);
        return bps < room ? bps : room;
    }

    /// Closes the receipt or the session, and records; which part of the stake that takes, in 1/10,000.
    function _convict(Case storage c, Verdict verdict, bytes32 receipt) private returns (uint16) {
        Docket storage docket = _dockets[receipt];
        if (verdict == Verdict.Clear) docket.closed = true;
        if (verdict != Verdict.Guilty && verdict != Verdict.Fault) return 0;
        (address accused, bytes30 offence) = (c.accused, docket.offence);
        Offence before = _offences[offence];
        // Another case over the same came first.
        if (before == Offence.Convicted || docket.closed) return 0;
        Record memory record = _records[accused];
        if (verdict == Verdict.Fault) {
            docket.closed = true;
            if (before == Offence.Fault) return 0;
            bool recent = record.faultAt != 0 && block.timestamp < record.faultAt + RELAPSE;
            // What was signed before anybody said that the machine is broken is the same fault.
            bool relapse = recent && c.signedAt > record.faultAt;
            if (!recent || relapse) record.faultAt = uint48(block.timestamp);
            if (!relapse) {
                (_offences[offence], _records[accused]) = (Offence.Fault, record);
                return 0;
            }
        }
        uint16 bps = uint16(_slashBps(record, c.signedAt));
        if (block.timestamp >= record.slashedAt + EVIDENCE) record.slashedBps = 0;
        if (record.convictedAt == 0) record.convictedAt = uint48(block.timestamp);
        if (bps != 0) record.slashedAt = uint48(block.timestamp);
        record.slashedBps += bps;
        (_offences[offence], _records[accused]) = (Offence.Convicted, record);
        return bps;
    }

    /// Bond, bounty, appeals, damages, and the pot.
    function _pay(bytes32 id, Case storage c, uint256 slashed) private {
        (uint256 bond, uint256 round, Verdict verdict) = (c.purse, c.round, c.verdict);
        (uint256 back, uint256 damages, uint256 bounty) = (bond, 0, slashed / 4);
        if (verdict == Verdict.Clear) (back, damages) = (0, bond / 2);
        else if (verdict == Verdict.Missed || verdict == Verdict.Unreadable) back = bond / 2;
        else if (slashed == 0 && verdict != Verdict.Guilty) back = bond - bond / FEE_PART;
        uint256 pot = slashed == 0 ? bond - back - damages : slashed / 2 - bounty;
        pot += _endAppeals(id, round, verdict, bond);
        // In the first round there were none before.
        uint256 tally = round == 0 ? c.tally : uint256(c.tally) + c.earlier;
        uint256 seats = _agreeing(tally, verdict);
        uint256 share = seats == 0 ? 0 : pot / seats;
        // No truncation: a pot is less than the token's cap.
        c.purse = uint96(share);
        emit Enforced(id, slashed, bounty, share);
        if (pot != share * seats) TOKEN.burn(pot - share * seats);
        if (back + bounty != 0) TOKEN.transfer(c.accuser, back + bounty);
        if (damages != 0) TOKEN.transfer(STAKING.payeeOf(c.accused), damages);
    }

    /// Pays back the appeals that changed the verdict; returns what the others bring.
    function _endAppeals(bytes32 id, uint256 rounds, Verdict verdict, uint256 bond) private returns (uint256 lost) {
        for (uint256 round = 0; round < rounds; round++) {
            Appeal memory made = _appeals[id][round];
            // A round that missed its quorum was not appealed.
            if (made.by == address(0)) continue;
            if (made.against == verdict) lost += _appealBond(bond, round);
            else TOKEN.transfer(made.by, _appealBond(bond, round));
        }
    }

    function _appealBond(uint256 bond, uint256 round) private pure returns (uint256) {
        return bond << (round + 1);
    }
}
