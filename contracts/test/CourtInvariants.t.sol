// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IBeacon} from "../interfaces/IBeacon.sol";
import {Ballot, Case, Receipt, Record, State, Verdict, Vote} from "../interfaces/ICourt.sol";
import {Node} from "../interfaces/IStaking.sol";
import {CourtWorld} from "./CourtWorld.sol";
import {Invariants, vm} from "./World.sol";

/// Up to six cases over three sessions of one node, side by side: opened, drawn, voted, appealed, redrawn, ruled, enforced,
/// settled, reported in any order, while the node and the jurors stake and leave.
contract CourtHandler is CourtWorld {
    struct Tried {
        bytes32 id;
        bytes32 session;
        uint256 time;
        bytes32 evidence;
        uint256 unitBps;
        address beacon;
    }

    struct Slash {
        uint256 time;
        uint256 bps;
    }

    Tried[] private tried;
    Slash[] private slashes;
    mapping(bytes32 session => uint256) private convictions;
    mapping(bytes32 receipt => bool) private closed;
    mapping(bytes32 id => bool) private enforced;
    uint256 private newestBlock = BLOCK;
    /// How often: 0 ruled without a slash, 1 with one, 2 appealed, 3 redrawn, 4 reported, 5 settled, 6 enforced without a
    /// slash, 7 with one.
    uint256[8] public reached;

    function setUp() public override {
        super.setUp();
        token.approve(address(court), type(uint256).max);
    }

    function some(uint256 which) private view returns (Tried memory t, Case memory c) {
        if (tried.length == 0) return (t, c);
        t = tried[which % tried.length];
        c = court.cases(t.id);
    }

    // Actions

    function accuse(uint256 which, uint256 ago, bool other) external {
        if (tried.length == 6) return;
        bytes32 sessionId = bytes32(which % 3 + 1);
        uint256 time = block.timestamp - within(ago, 0, 2 days);
        Tried memory t = Tried(0, sessionId, time, bytes32(tried.length + 1), 0, address(court.beacon()));
        (, t.unitBps) = court.rates();
        // Half of the time another case over a receipt that was tried already.
        if (other && tried.length != 0) {
            Tried memory before = tried[which % tried.length];
            (t.session, t.time) = (before.session, before.time);
        }
        Receipt memory r = receiptOf(t.session, t.time);
        bytes memory signature = signed(r);
        uint256 purse = token.balanceOf(accuser);
        uint256 bond = bondOf(r);
        vm.prank(accuser);
        try court.open(r, signature, t.evidence) returns (bytes32 id) {
            assertEq(convictions[t.session], 0); // C1
            require(!closed[court.digestOf(r)], "C1: a closed receipt is tried");
            assertEq(purse - token.balanceOf(accuser), bond);
            t.id = id;
            tried.push(t);
        } catch {
            bool reason = convictions[t.session] != 0 || closed[court.digestOf(r)] || bond == 0;
            reason = reason || block.timestamp >= t.time + terms.evidence || outside() < terms.minUnits;
            require(reason, "refused without a reason");
        }
    }

    function bondOf(Receipt memory r) private view returns (uint256) {
        return court.bondFor(r.node, r.time) << court.doublings(court.digestOf(r));
    }

    function outside() private view returns (uint256) {
        return staking.totalUnitsAt(block.timestamp) - staking.unitsAt(node, block.timestamp);
    }

    /// A whole round at once: actions drawn one by one seldom come in this order.
    function tryRound(uint256 which, uint256 randao, uint256 choices, uint256 counts, uint256 silent) external {
        seed(which, randao);
        takeSeats(which, choices, counts);
        showVotes(which, silent);
    }

    function seed(uint256 which, uint256 randao) public {
        (Tried memory t, Case memory c) = some(which);
        if (c.state != State.Open) return;
        bytes memory header = mine(t.id, randao);
        if (block.number > newestBlock) newestBlock = block.number;
        vm.roll(newestBlock);
        if (newestBlock - c.seedBlock <= 256) court.draw(t.id, header);
        else if (newestBlock > c.seedBlock + terms.headers) court.retarget(t.id);
    }

    /// All jurors take seats, some of them not all, and mostly vote alike.
    function takeSeats(uint256 which, uint256 choices, uint256 counts) public {
        (Tried memory t, Case memory c) = some(which);
        if (c.state != State.Drawn || block.timestamp >= c.commitEnd || !remembered(c)) return;
        for (uint256 i = 0; i < JURORS; i++) {
            if (court.ballots(t.id, c.round, juror(i)).seats != 0) continue;
            uint256[] memory seats = list(t.id, c, c.round, juror(i));
            if (seats.length == 0) continue;
            uint256 count = counts >> 8 * i & 3 == 0 ? within(counts >> 8 * i, 1, seats.length) : seats.length;
            bytes32 commitment = commitmentOf(t.id, juror(i), choice(choices, i));
            vm.prank(juror(i));
            court.commit(t.id, firstOf(seats, count), commitment);
        }
    }

    function choice(uint256 choices, uint256 i) private pure returns (Vote) {
        uint256 own = choices >> 16 * (i + 1);
        return Vote(within(own % 4 == 0 ? own / 4 : choices, 1, 5));
    }

    function showVotes(uint256 which, uint256 silent) public {
        (Tried memory t, Case memory c) = some(which);
        if (c.state != State.Drawn) return;
        if (block.timestamp < c.commitEnd) vm.warp(c.commitEnd);
        if (block.timestamp >= c.commitEnd + terms.reveal) return;
        for (uint256 i = 0; i < JURORS; i++) {
            if (silent >> 8 * i & 7 == 0) continue;
            Ballot memory b = court.ballots(t.id, c.round, juror(i));
            for (uint8 v = 1; v <= 5 && b.seats != 0 && b.vote == Vote.None; v++) {
                if (b.commitment == bytes26(commitmentOf(t.id, juror(i), Vote(v)))) reveal(t.id, i, Vote(v));
            }
        }
    }

    function dispute(uint256 which) external {
        (Tried memory t, Case memory c) = some(which);
        if (c.state != State.Drawn || c.round == 2) return;
        uint256 revealEnd = c.commitEnd + terms.reveal;
        if (block.timestamp < revealEnd) vm.warp(revealEnd);
        bool missed = court.standing(t.id) == Verdict.Missed;
        if (missed) court.redraw(t.id);
        else if (block.timestamp < revealEnd + terms.appeal) court.appeal(t.id);
        else return;
        reached[missed ? 3 : 2]++;
    }

    function decide(uint256 which) external {
        (Tried memory t, Case memory c) = some(which);
        if (c.state != State.Drawn) return;
        uint256 end = c.commitEnd + terms.reveal + (c.round == 2 ? 0 : terms.appeal);
        if (block.timestamp < end) vm.warp(end);
        if (court.standing(t.id) == Verdict.Missed && c.round != 2) return;
        ruled(t, c);
    }

    function ruled(Tried memory t, Case memory c) private {
        uint256 supply = token.totalSupply();
        Record memory before = court.records(node);
        bytes32 receipt = digestOf(t.session, t.time);
        Verdict verdict = court.rule(receipt, t.evidence);
        assertEq(token.totalSupply(), supply);
        checkVerdict(t.id, c, verdict);
        closed[receipt] = court.receiptClosed(receipt);
        if (verdict == Verdict.Clear || verdict == Verdict.Fault) {
            require(closed[receipt] || convictions[t.session] != 0, "C1: still open");
        }
        uint256 bps = court.cases(t.id).slashBps;
        reached[bps == 0 ? 0 : 1]++;
        if (bps == 0) return;
        assertEq(++convictions[t.session], 1); // C1
        bool relapse = verdict == Verdict.Fault && before.faultAt != 0 && t.time > before.faultAt;
        require(verdict == Verdict.Guilty || relapse, "C5: no conviction");
        slashes.push(Slash(block.timestamp, bps));
    }

    function enforce(uint256 which) external {
        (Tried memory t, Case memory c) = some(which);
        if (c.state != State.Ruled) return;
        (uint256 stake, uint256 supply) = (staking.nodes(node).stake, token.totalSupply());
        court.enforce(t.id);
        require(!enforced[t.id], "C5: twice");
        enforced[t.id] = true;
        uint256 slashed = stake - staking.nodes(node).stake;
        assertEq(slashed, stake * c.slashBps / 10_000); // C5
        assertLe(slashed, 2 * (supply - token.totalSupply()), "less than half burned");
        reached[slashed == 0 ? 6 : 7]++;
    }

    /// A case that nobody draws, one time in eight: the days that pass end the others' trials, too.
    function forsake(uint256 which) external {
        (Tried memory t, Case memory c) = some(which);
        uint256 end = (c.round == 0 ? c.openedAt : c.commitEnd) + 4 * terms.evidence;
        if (c.state != State.Open || (block.timestamp < end && (which >> 8) % 8 != 0)) return;
        if (block.timestamp < end) vm.warp(end);
        ruled(t, c);
    }

    /// C5, C6: out of the ballots, of the last round that had a quorum: two thirds of at least half of the seats.
    function checkVerdict(bytes32 id, Case memory c, Verdict verdict) private view {
        assertLe(c.round, 2, "C6");
        uint256[6] memory sums;
        uint256 round = c.round + 1;
        do {
            round--;
            sums = counted(id, round);
        } while (round != 0 && !quorum(sums, round));
        uint256 voting = sums[1] + sums[2] + sums[3] + sums[4];
        if (verdict == Verdict.Missed) require(!quorum(sums, round), "C5: no quorum in any round");
        else if (verdict != Verdict.Void) assertLe(court.seatsOf(round), 2 * voting, "C5: too few votes");
        if (verdict == Verdict.Guilty) assertLe(2 * voting, 3 * sums[1], "C5");
        if (verdict == Verdict.Fault) assertLe(2 * voting, 3 * (sums[1] + sums[3]), "C5");
    }

    function quorum(uint256[6] memory sums, uint256 round) private view returns (bool) {
        return 2 * (sums[1] + sums[2] + sums[3] + sums[4] + sums[5]) >= court.seatsOf(round);
    }

    function counted(bytes32 id, uint256 round) private view returns (uint256[6] memory sums) {
        for (uint256 i = 0; i < JURORS; i++) {
            Ballot memory b = court.ballots(id, round, juror(i));
            sums[uint8(b.vote)] += b.vote == Vote.None ? 0 : b.seats;
        }
    }

    function pay(uint256 which, uint256 number, uint256 i) external {
        (Tried memory t, Case memory c) = some(which);
        Ballot memory b = court.ballots(t.id, number % 3, juror(i % JURORS));
        if (c.state != State.Enforced || b.vote == Vote.None || b.settled) return;
        court.settle(t.id, number % 3, juror(i % JURORS));
        reached[5]++;
    }

    function tell(uint256 which, uint256 number, uint256 i, uint256 count) external {
        (Tried memory t, Case memory c) = some(which);
        (number, i) = (within(number, 0, c.round), i % JURORS);
        if (court.seeds(t.id, number) == 0 || !remembered(c)) return;
        if (number == c.round && block.timestamp < c.commitEnd + terms.reveal) return;
        Ballot memory b = court.ballots(t.id, number, juror(i));
        uint256[] memory seats = list(t.id, c, number, juror(i));
        uint256 known = b.fined + (b.vote == Vote.None ? 0 : b.seats);
        if (seats.length <= known) return;
        uint256 stake = staking.nodes(juror(i)).stake;
        uint256 told = within(count, known + 1, seats.length);
        court.report(t.id, number, juror(i), firstOf(seats, told));
        reached[4]++;
        assertLe(stake - staking.nodes(juror(i)).stake, (told - known) * unitSize * t.unitBps / 1e7, "fined too much");
    }

    function unbond(uint256 n, uint256 amount) external {
        address who = n % 2 == 0 ? node : juror(n % JURORS);
        Node memory state = staking.nodes(who);
        uint256 active = state.stake - state.leaving;
        if (active < 8 * minStake) return;
        vm.prank(who);
        staking.unbond(within(amount, 0, minStake));
    }

    function withdraw() external {
        Node memory state = staking.nodes(node);
        vm.prank(node);
        try staking.withdraw() {
            assertEq(state.holds, 0); // no exit before the ruling
        } catch {
            require(state.holds != 0 || block.timestamp < state.leaveAt, "refused without a reason");
        }
    }

    function top(uint256 n, uint256 amount) external {
        address who = n % 2 == 0 ? node : juror(n % JURORS);
        Node memory state = staking.nodes(who);
        uint256 active = state.stake - state.leaving;
        staking.stake(who, within(amount, active < minStake ? minStake - active : 0, 2 * minStake));
    }

    function jail(uint256 n) external {
        try staking.jail(juror(n % JURORS)) {} catch {}
    }

    function beat(uint256 n) external {
        vm.prank(juror(n % JURORS));
        try staking.beat() {} catch {}
    }

    function govern(uint256 bond, uint256 unit, bool another) external {
        vm.prank(address(timelock));
        court.setRates(within(bond, 1250, 5000), within(unit, 2500, 40_000));
        if (!another) return;
        // Another address with the same code: cases must ask the one that they were opened with.
        address next = deploy("Beacon", "");
        vm.prank(address(timelock));
        court.setBeacon(IBeacon(next));
    }

    function pass(uint256 time) external {
        vm.warp(block.timestamp + within(time, 1, 1 days));
    }

    // Checks

    function remembered(Case memory c) private view returns (bool) {
        return block.timestamp / epoch <= c.openedAt / epoch + 6;
    }

    /// The winning units of `who` in this case.
    function list(bytes32 id, Case memory c, uint256 round, address who) private view returns (uint256[] memory seats) {
        uint256 own = staking.unitsAt(who, c.openedAt);
        seats = new uint256[](own);
        uint256 count;
        for (uint256 unit = 0; unit < own; unit++) {
            if (court.wins(id, round, who, unit)) seats[count++] = unit;
        }
        return firstOf(seats, count);
    }

    /// C2: bonds, appeals, and shares that wait.
    function checkBalance() external view {
        uint256 sum;
        for (uint256 i = 0; i < tried.length; i++) {
            Case memory c = court.cases(tried[i].id);
            if (c.state != State.Enforced) sum += c.purse;
            for (uint256 round = 0; round <= c.round; round++) {
                if (c.state != State.Enforced && court.appeals(tried[i].id, round).by != address(0)) {
                    sum += uint256(c.purse) << (round + 1);
                }
                if (c.state == State.Enforced) sum += waiting(tried[i].id, c, round);
            }
        }
        assertEq(token.balanceOf(address(court)), sum);
    }

    function waiting(bytes32 id, Case memory c, uint256 round) private view returns (uint256 sum) {
        for (uint256 i = 0; i < JURORS; i++) {
            Ballot memory b = court.ballots(id, round, juror(i));
            bool same = uint8(c.verdict) == uint8(b.vote) + 1;
            if (c.verdict == Verdict.Unreadable) same = false;
            if (c.verdict == Verdict.Void) same = b.vote == Vote.Guilty || b.vote == Vote.Clear || b.vote == Vote.Fault;
            if (c.verdict == Verdict.Fault) same = b.vote == Vote.Fault || b.vote == Vote.Guilty;
            if (same && !b.settled) sum += uint256(b.seats) * c.purse;
        }
    }

    /// C8.
    function checkRates() external view {
        (uint256 bond, uint256 unit) = court.rates();
        require(1250 <= bond && bond <= 5000 && 2500 <= unit && unit <= 40_000, "C8: out of bounds");
        for (uint256 i = 0; i < tried.length; i++) {
            Case memory c = court.cases(tried[i].id);
            assertEq(c.unitBps, tried[i].unitBps);
            assertEq(address(court.beacons(c.beacon)), tried[i].beacon);
        }
    }

    /// C3 and C4.
    function checkHolds() external view {
        uint256 holds;
        for (uint256 i = 0; i < tried.length; i++) {
            Case memory c = court.cases(tried[i].id);
            if (c.state != State.Enforced) holds++;
            assertEq(court.ballots(tried[i].id, c.round, node).seats, 0);
            if (!remembered(c)) continue;
            for (uint256 k = 0; k < JURORS; k++) {
                Ballot memory b = court.ballots(tried[i].id, c.round, juror(k));
                uint256 known = b.fined + (b.vote == Vote.None ? 0 : b.seats);
                assertLe(known, staking.unitsAt(juror(k), c.openedAt), "C4");
            }
        }
        assertEq(staking.nodes(node).holds, holds);
    }

    /// C5: what the rulings of any EVIDENCE take.
    function checkCap() external view {
        for (uint256 i = 0; i < slashes.length; i++) {
            uint256 sum;
            for (uint256 k = i; k < slashes.length && slashes[k].time < slashes[i].time + terms.evidence; k++) {
                sum += slashes[k].bps;
            }
            assertLe(sum, 3000, "C5: above the cap");
        }
    }
}

contract CourtInvariants is Invariants {
    CourtHandler private handler;

    function setUp() public {
        handler = new CourtHandler();
        actedOnBy(handler);
    }

    /// What no action reaches holds vacuously.
    function test_the_actions_reach_everything() public {
        for (uint256 i = 0; i < 400; i++) {
            uint256 x = uint256(keccak256(abi.encode(i)));
            if (x % 8 == 0) handler.accuse(x >> 8, x >> 16, x & 256 == 0);
            if (x % 8 == 1) handler.tryRound(x >> 8, x >> 16, x >> 32, x >> 64, x >> 128);
            if (x % 8 == 2) handler.dispute(x >> 8);
            if (x % 8 == 3) handler.decide(x >> 8);
            if (x % 16 == 4) handler.enforce(x >> 8);
            for (uint256 k = 0; k < 15 && x % 8 == 4; k++) {
                handler.pay(x >> 8, k / 5, k);
            }
            if (x % 8 == 5) handler.tell(x >> 8, x >> 16, x >> 32, x >> 64);
            if (x % 8 == 6) handler.pass(x >> 8);
            if (x % 8 == 7) handler.withdraw();
            if (x % 32 == 7) handler.govern(x >> 8, x >> 16, x & 256 == 0);
            handler.checkRates();
            handler.checkBalance();
            handler.checkHolds();
            handler.checkCap();
        }
        for (uint256 i = 0; i < 8; i++) {
            require(handler.reached(i) != 0, vm.toString(i));
        }
    }

    function invariant_C2_the_balance_is_bonds_and_shares() public view {
        handler.checkBalance();
    }

    function invariant_C3_C4_holds_are_open_cases() public view {
        handler.checkHolds();
    }

    function invariant_C8_a_case_keeps_its_terms() public view {
        handler.checkRates();
    }

    function invariant_C5_no_evidence_period_sees_more_than_the_cap() public view {
        handler.checkCap();
    }
}
