// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IBeacon} from "../interfaces/IBeacon.sol";
import {Case, ICourt, Receipt, Record, State, Terms, Verdict, Vote} from "../interfaces/ICourt.sol";
import {IStaking} from "../interfaces/IStaking.sol";
import {CourtWorld} from "./CourtWorld.sol";
import {vm} from "./World.sol";

contract CourtTest is CourtWorld {
    uint256 private constant STAKE = 10_000 ether;
    uint256 private constant BOND = 50 ether; // half of 1 % of the stake
    uint256 private constant FINE = 0.5 ether; // a thousandth of a unit

    function is_(Verdict actual, Verdict expected) private pure {
        assertEq(uint256(actual), uint256(expected));
    }

    function outOfTime(uint256 from, uint256 until) private {
        vm.expectRevert(abi.encodeWithSelector(ICourt.OutOfTime.selector, block.timestamp, from, until));
    }

    function wrongState(State state, State expected) private {
        vm.expectRevert(abi.encodeWithSelector(ICourt.WrongState.selector, state, expected));
    }

    // Construction

    function refuses(Terms memory changed, bytes memory reason) private {
        bytes memory code = initcode("Court", abi.encode(staking, beacon, timelock, changed));
        refusesToDeploy(code, reason);
    }

    function test_the_terms_are_the_parameters() public view {
        assertEq(court.EVIDENCE(), parameter("EVIDENCE"));
        assertEq(court.COMMIT(), parameter("COMMIT"));
        assertEq(court.REVEAL(), parameter("REVEAL"));
        assertEq(court.APPEAL(), parameter("APPEAL"));
        assertEq(court.RELAPSE(), parameter("RELAPSE"));
        assertEq(court.LOOKAHEAD(), parameter("LOOKAHEAD"));
        assertEq(court.HEADERS(), parameter("HEADERS"));
        assertEq(court.MIN_UNITS(), parameter("MIN_UNITS"));
        assertEq(address(court.STAKING()), address(staking));
        assertEq(address(court.TOKEN()), address(token));
        assertEq(address(court.beacon()), address(beacon));
        assertEq(court.GOVERNOR(), address(timelock));
        // A stake that was there when the receipt was signed is there at the ruling.
        assertEq(3 * (court.COMMIT() + court.REVEAL()) + 2 * court.APPEAL(), parameter("TRIAL"));
        assertLe(court.EVIDENCE() + parameter("TRIAL"), staking.UNBONDING(), "unbonding");
    }

    function test_unbonding_outlasts_evidence_and_trial() public {
        Terms memory changed = terms;
        changed.evidence = unbonding - parameter("TRIAL");
        deploy("Court", abi.encode(staking, beacon, timelock, changed));
        changed.evidence += 1;
        refuses(changed, abi.encodeWithSelector(ICourt.TooShortUnbonding.selector, unbonding, unbonding + 1));
    }

    /// A day before: three headers are waited for.
    function test_a_trial_ends_before_its_units_are_forgotten() public {
        Terms memory changed = terms;
        changed.appeal = (5 * epoch - 3 * (terms.commit + terms.reveal)) / 2;
        deploy("Court", abi.encode(staking, beacon, timelock, changed));
        changed.appeal += 1;
        refuses(changed, abi.encodeWithSelector(ICourt.TooLongTrial.selector, 6 * epoch + 2, 6 * epoch));
    }

    // Opening

    function test_opening_takes_the_bond_and_holds_the_node() public {
        bytes32 id = court.caseId(digestOf("session", opened), EVIDENCE_CID);
        Receipt memory r = receiptOf("session", opened);
        bytes memory signature = signed(r);
        vm.expectEmit(address(court));
        emit ICourt.Opened(id, node, accuser, court.digestOf(r), EVIDENCE_CID, BOND);
        vm.expectEmit(address(court));
        emit ICourt.Seeding(id, 0, BLOCK + terms.lookahead);
        vm.prank(accuser);
        assertEq(court.open(r, signature, EVIDENCE_CID), id);
        assertEq(token.balanceOf(address(court)), BOND);
        assertEq(staking.nodes(node).holds, 1);
        Case memory c = court.cases(id);
        assertEq(c.accuser, accuser);
        assertEq(c.accused, node);
        assertEq(c.openedAt, opened);
        assertEq(c.signedAt, opened);
        assertEq(c.purse, BOND);
        assertEq(c.units, 120);
        assertEq(c.seedBlock, BLOCK + terms.lookahead);
        assertEq(uint256(c.state), uint256(State.Open));
        assertEq(court.bondFor(node, opened), BOND);
    }

    function test_who_is_in_jail_sits_in_no_jury_of_the_next_epoch() public {
        vm.warp(START + stale);
        staking.jail(juror(0));
        assertEq(court.cases(open("first", block.timestamp, EVIDENCE_CID)).units, 120);
        vm.warp(block.timestamp + epoch);
        Receipt memory r = receiptOf("second", block.timestamp);
        bytes memory signature = signed(r);
        vm.expectRevert(abi.encodeWithSelector(ICourt.TooFewUnits.selector, 96, 120));
        vm.prank(accuser);
        court.open(r, signature, EVIDENCE_CID);
        vm.prank(juror(0));
        staking.beat();
        vm.warp(block.timestamp + epoch);
        assertEq(court.cases(open("third", block.timestamp, EVIDENCE_CID)).units, 120);
    }

    function test_the_digest_is_what_nodes_sign() public view {
        Receipt memory r = receiptOf("session", opened);
        string memory kind = "Receipt(address node,bytes32 model,bytes32 numericClass,bytes32 session,uint32 attempt,"
        "uint16 start,uint16 end,uint32 first,uint32 last,uint32 revision,bytes32 context,bytes32 input,bytes32 output,"
        "bytes32 previous,bytes32 challenge,bytes32 sketches,uint48 at)";
        bytes32 structHash = keccak256(bytes.concat(abi.encode(keccak256(bytes(kind))), abi.encode(r)));
        bytes32 domain = separator("Tallystick", address(staking));
        assertEq(court.digestOf(r), keccak256(abi.encodePacked("\x19\x01", domain, structHash)));
    }

    function test_only_what_the_node_signed_is_tried() public {
        Receipt memory r = receiptOf("session", opened);
        bytes memory signature = signed(r);
        r.output = "another";
        try court.open(r, signature, EVIDENCE_CID) {
            revert("opened");
        } catch {}
        r = receiptOf("session", opened);
        (uint8 v, bytes32 a, bytes32 b) = vm.sign(STRANGER_KEY, court.digestOf(r));
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotSigned.selector, stranger, node));
        court.open(r, abi.encodePacked(a, b, v), EVIDENCE_CID);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotSigned.selector, address(0), node));
        court.open(r, "", EVIDENCE_CID);
    }

    function test_no_node_is_nobody() public {
        Receipt memory r = receiptOf("session", opened);
        r.node = address(0);
        (uint8 v, bytes32 a, bytes32 b) = vm.sign(STRANGER_KEY, court.digestOf(r));
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotSigned.selector, stranger, address(0)));
        court.open(r, abi.encodePacked(a, b, v), EVIDENCE_CID);
    }

    function test_evidence_ends_to_the_second() public {
        uint256 time = block.timestamp;
        vm.warp(time + terms.evidence - 1);
        open("in time", time, EVIDENCE_CID);
        vm.warp(time + terms.evidence);
        Receipt memory r = receiptOf("too late", time);
        bytes memory signature = signed(r);
        outOfTime(time, time + terms.evidence);
        court.open(r, signature, EVIDENCE_CID);
    }

    function test_a_receipt_of_the_future_waits() public {
        Receipt memory r = receiptOf("session", opened + 1);
        bytes memory signature = signed(r);
        outOfTime(opened + 1, opened + 1 + terms.evidence);
        court.open(r, signature, EVIDENCE_CID);
        vm.warp(opened + 1);
        vm.prank(accuser);
        court.open(r, signature, EVIDENCE_CID);
    }

    function test_the_same_evidence_is_tried_once() public {
        bytes32 id = open();
        Receipt memory r = receiptOf("session", opened);
        bytes memory signature = signed(r);
        vm.expectRevert(abi.encodeWithSelector(ICourt.CaseKnown.selector, id));
        court.open(r, signature, EVIDENCE_CID);
        // Other evidence is another case: a dead CID in front protects nobody.
        open("session", opened, "other evidence");
        assertEq(staking.nodes(node).holds, 2);
    }

    /// MIN_UNITS is 120, and so are the jurors' units.
    function test_there_is_no_court_without_jurors() public {
        vm.prank(juror(0));
        staking.unbond(unitSize);
        open(); // they were there when the epoch began
        vm.warp(START + 2 * epoch);
        Receipt memory r = receiptOf("session 2", block.timestamp);
        bytes memory signature = signed(r);
        vm.expectRevert(abi.encodeWithSelector(ICourt.TooFewUnits.selector, 119, 120));
        court.open(r, signature, EVIDENCE_CID);
    }

    function test_nothing_at_stake_nothing_to_win() public {
        vm.prank(node);
        staking.unbond(STAKE);
        vm.warp(START + epoch + unbonding);
        vm.prank(node);
        staking.withdraw();
        Receipt memory r = receiptOf("session", block.timestamp);
        bytes memory signature = signed(r);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NothingToWin.selector, node));
        court.open(r, signature, EVIDENCE_CID);
    }

    function test_the_accused_cannot_leave_before_the_ruling() public {
        vm.prank(node);
        staking.unbond(STAKE);
        vm.warp(opened + unbonding - 4 days);
        uint256 time = block.timestamp;
        bytes32 id = open("session", time, EVIDENCE_CID);
        opened = time;
        draw(id);
        vote(id, Vote.Guilty);
        vm.warp(time + 4 days);
        vm.expectRevert(abi.encodeWithSelector(IStaking.Held.selector, 1));
        vm.prank(node);
        staking.withdraw();
        rule("session", time, EVIDENCE_CID);
        vm.prank(node);
        staking.withdraw();
        assertEq(token.balanceOf(node), STAKE - STAKE / 100);
    }

    // Seeds

    function test_the_seed_is_the_pinned_blocks() public {
        bytes32 id = open();
        bytes memory header = mine(id, 7);
        bytes32 seed = keccak256(abi.encode(uint256(7), id, uint256(0)));
        vm.expectEmit(address(court));
        emit ICourt.Drawn(id, 0, seed, 15, 120, opened + terms.commit);
        court.draw(id, header);
        assertEq(court.seeds(id, 0), seed);
        wrongState(State.Drawn, State.Open);
        court.draw(id, header);
    }

    function test_no_other_block_makes_a_seed() public {
        bytes32 id = open();
        uint256 number = court.cases(id).seedBlock;
        bytes memory other = headerOf(number - 1, 1);
        vm.roll(number + 1);
        vm.setBlockhash(number - 1, keccak256(other));
        vm.expectRevert(abi.encodeWithSelector(IBeacon.NotTheBlock.selector, number - 1, number));
        court.draw(id, other);
    }

    function test_a_seed_is_renewed_when_its_header_is_gone() public {
        bytes32 id = open();
        uint256 until = BLOCK + terms.lookahead + terms.headers;
        vm.roll(until);
        vm.expectRevert(
            abi.encodeWithSelector(ICourt.HeaderAvailable.selector, BLOCK + terms.lookahead, until)
        );
        court.retarget(id);
        vm.roll(until + 1);
        vm.expectEmit(address(court));
        emit ICourt.Seeding(id, 0, until + 1 + terms.lookahead);
        court.retarget(id);
        draw(id);
        vm.roll(block.number + terms.headers + 1);
        wrongState(State.Drawn, State.Open);
        court.retarget(id);
    }

    // Committing

    function test_a_seat_commits() public {
        bytes32 id = open();
        wrongState(State.Open, State.Drawn);
        court.commit(id, new uint256[](1), 0);
        draw(id);
        uint256[] memory seats = seatsOf(id, juror(0));
        bytes32 commitment = commitmentOf(id, juror(0), Vote.Guilty);
        vm.expectEmit(address(court));
        emit ICourt.Committed(id, 0, juror(0), seats.length);
        vm.prank(juror(0));
        court.commit(id, seats, commitment);
        assertEq(court.ballots(id, 0, juror(0)).seats, seats.length);
        vm.expectRevert(abi.encodeWithSelector(ICourt.HasCommitted.selector, juror(0)));
        vm.prank(juror(0));
        court.commit(id, seats, 0);
    }

    function test_a_hot_key_votes_for_its_node() public {
        bytes memory signature = proof(CLIENT_KEY, juror(1), block.timestamp);
        vm.prank(juror(1));
        staking.bind(client, block.timestamp, signature);
        bytes32 id = open();
        draw(id);
        uint256[] memory seats = seatsOf(id, juror(1));
        bytes32 commitment = commitmentOf(id, juror(1), Vote.Clear);
        vm.prank(client);
        court.commit(id, seats, commitment);
        vm.warp(court.cases(id).commitEnd);
        vm.expectEmit(address(court));
        emit ICourt.Revealed(id, 0, juror(1), Vote.Clear, seats.length, ROOTS);
        court.reveal(id, juror(1), Vote.Clear, ROOTS, "salt");
    }

    function test_commitments_end_to_the_second() public {
        bytes32 id = open();
        draw(id);
        uint256 end = opened + terms.commit;
        vm.warp(end - 1);
        commit(id, 0, Vote.Guilty, 1);
        vm.warp(end);
        uint256[] memory seats = seatsOf(id, juror(1));
        outOfTime(0, end);
        vm.prank(juror(1));
        court.commit(id, seats, 0);
    }

    function test_only_winning_units_are_seats() public {
        bytes32 id = open();
        draw(id);
        uint256[] memory seats = seatsOf(id, juror(0));
        uint256[] memory list = new uint256[](1);
        for (uint256 unit = 0; unit < JUROR_UNITS; unit++) {
            bool won = court.wins(id, 0, juror(0), unit);
            bool listed;
            for (uint256 i = 0; i < seats.length; i++) {
                if (seats[i] == unit) listed = true;
            }
            require(won == listed, "the views differ");
            list[0] = unit;
            if (!won) refusedSeat(id, juror(0), list, abi.encodeWithSelector(ICourt.NoSeat.selector, juror(0), unit));
        }
        // Units that it does not have win, too, but not for it.
        uint256 threshold = type(uint256).max / 120 * 15;
        uint256 beyond = JUROR_UNITS;
        while (uint256(keccak256(abi.encode(court.seeds(id, 0), juror(0), beyond))) >= threshold) beyond++;
        list[0] = beyond;
        require(!court.wins(id, 0, juror(0), beyond), "beyond its units");
        refusedSeat(id, juror(0), list, abi.encodeWithSelector(ICourt.NoSeat.selector, juror(0), beyond));
        refusedSeat(id, juror(0), new uint256[](0), abi.encodeWithSelector(ICourt.BadSeats.selector));
        uint256[] memory twice = new uint256[](2);
        (twice[0], twice[1]) = (seats[0], seats[0]);
        refusedSeat(id, juror(0), twice, abi.encodeWithSelector(ICourt.BadSeats.selector));
        (twice[0], twice[1]) = (seats[1], seats[0]);
        refusedSeat(id, juror(0), twice, abi.encodeWithSelector(ICourt.BadSeats.selector));
    }

    function refusedSeat(bytes32 id, address who, uint256[] memory list, bytes memory reason) private {
        vm.expectRevert(reason);
        vm.prank(who);
        court.commit(id, list, "commitment");
    }

    function test_the_accused_is_no_juror() public {
        bytes32 id = open();
        draw(id);
        for (uint256 unit = 0; unit < 20; unit++) {
            require(!court.wins(id, 0, node, unit), "the accused has a seat");
        }
        refusedSeat(id, node, new uint256[](1), abi.encodeWithSelector(ICourt.IsAccused.selector, node));
        vm.warp(opened + terms.commit + terms.reveal);
        vm.expectRevert(abi.encodeWithSelector(ICourt.IsAccused.selector, node));
        court.report(id, 0, node, new uint256[](1));
    }

    function test_stake_that_came_since_has_no_seat() public {
        bytes32 id = open();
        vm.warp(opened + epoch);
        serving(stranger, llama, 50 * minStake);
        draw(id);
        require(!court.wins(id, 0, stranger, 0), "a late seat");
        uint256[] memory list = new uint256[](1);
        refusedSeat(id, stranger, list, abi.encodeWithSelector(ICourt.NoSeat.selector, stranger, 0));
    }

    function test_before_the_draw_nobody_wins() public {
        bytes32 id = open();
        require(!court.wins(id, 0, juror(0), 0), "won");
    }

    // Revealing

    function test_votes_are_revealed_between_two_seconds() public {
        bytes32 id = open();
        draw(id);
        commit(id, 0, Vote.Guilty, 2);
        commit(id, 1, Vote.Guilty, 2);
        uint256 start = opened + terms.commit;
        vm.warp(start - 1);
        outOfTime(start, start + terms.reveal);
        reveal(id, 0, Vote.Guilty);
        vm.warp(start);
        reveal(id, 0, Vote.Guilty);
        vm.warp(start + terms.reveal);
        outOfTime(start, start + terms.reveal);
        reveal(id, 1, Vote.Guilty);
        vm.warp(start + terms.reveal - 1);
        reveal(id, 1, Vote.Guilty);
        assertEq(court.cases(id).tally, 4);
    }

    function test_no_vote_is_copied_changed_or_counted_twice() public {
        bytes32 id = open();
        draw(id);
        commit(id, 0, Vote.Guilty, 2);
        uint256[] memory seats = seatsOf(id, juror(1));
        bytes32 copied = commitmentOf(id, juror(0), Vote.Guilty);
        vm.prank(juror(1));
        court.commit(id, seats, copied);
        vm.warp(court.cases(id).commitEnd);
        wrongReveal(id, 1, Vote.Guilty); // what is another's opens for nobody else
        wrongReveal(id, 0, Vote.Clear);
        wrongReveal(id, 2, Vote.Guilty); // did not commit
        reveal(id, 0, Vote.Guilty);
        wrongReveal(id, 0, Vote.Guilty);
        assertEq(court.cases(id).tally, 2);
    }

    function wrongReveal(bytes32 id, uint256 i, Vote choice) private {
        vm.expectRevert(abi.encodeWithSelector(ICourt.WrongReveal.selector, juror(i)));
        reveal(id, i, choice);
    }

    function test_no_vote_is_none() public {
        bytes32 id = open();
        draw(id);
        commit(id, 0, Vote.None, 2);
        vm.warp(court.cases(id).commitEnd);
        wrongReveal(id, 0, Vote.None);
    }

    // Verdicts

    function standing(Vote[5] memory votes, uint8[5] memory counts, Verdict expected) private {
        bytes32 id = open();
        uint256 most;
        for (uint256 i = 0; i < JURORS; i++) {
            if (counts[i] > most) most = counts[i];
        }
        draw(id, most, 1000);
        vote(id, votes, counts);
        is_(court.standing(id), expected);
    }

    function test_half_of_the_expected_seats_are_a_quorum() public {
        Vote g = Vote.Guilty;
        standing([g, g, g, g, g], [2, 2, 2, 1, 0], Verdict.Missed);
    }

    function test_eight_of_fifteen_are_a_quorum() public {
        Vote g = Vote.Guilty;
        standing([g, g, g, g, g], [2, 2, 2, 2, 0], Verdict.Guilty);
    }

    function test_one_seat_rules_nothing_however_many_abstain() public {
        standing([Vote.Guilty, Vote.Abstain, Vote.Abstain, Vote.Abstain, Vote.Abstain], [1, 2, 2, 2, 2], Verdict.Void);
    }

    function test_a_ruling_takes_votes_of_half_of_the_expected_seats() public {
        Vote g = Vote.Guilty;
        standing([g, g, g, g, Vote.Abstain], [2, 2, 2, 2, 2], Verdict.Guilty);
    }

    function test_fewer_votes_than_that_rule_nothing() public {
        Vote g = Vote.Guilty;
        standing([g, g, g, g, Vote.Abstain], [2, 2, 2, 1, 2], Verdict.Void);
    }

    function test_all_abstain() public {
        Vote a = Vote.Abstain;
        standing([a, a, a, a, a], [2, 2, 2, 2, 2], Verdict.Void);
    }

    function test_two_thirds_convict() public {
        standing([Vote.Guilty, Vote.Guilty, Vote.Guilty, Vote.Clear, Vote.Clear], [2, 2, 2, 2, 1], Verdict.Guilty);
    }

    function test_less_than_two_thirds_do_not_convict() public {
        standing([Vote.Guilty, Vote.Guilty, Vote.Guilty, Vote.Clear, Vote.Clear], [2, 2, 1, 2, 1], Verdict.Void);
    }

    function test_two_thirds_clear() public {
        standing([Vote.Clear, Vote.Clear, Vote.Clear, Vote.Guilty, Vote.Fault], [2, 2, 2, 2, 1], Verdict.Clear);
    }

    function test_less_than_two_thirds_do_not_clear() public {
        standing([Vote.Clear, Vote.Clear, Vote.Clear, Vote.Guilty, Vote.Unreadable], [2, 2, 1, 2, 1], Verdict.Void);
    }

    function test_guilty_and_fault_together_are_a_fault() public {
        standing([Vote.Fault, Vote.Fault, Vote.Guilty, Vote.Clear, Vote.Clear], [2, 2, 2, 2, 1], Verdict.Fault);
    }

    function test_less_than_two_thirds_find_no_fault() public {
        standing([Vote.Fault, Vote.Fault, Vote.Guilty, Vote.Clear, Vote.Clear], [2, 2, 1, 2, 1], Verdict.Void);
    }

    function test_two_thirds_could_not_read() public {
        Vote u = Vote.Unreadable;
        standing([u, u, u, Vote.Guilty, Vote.Clear], [2, 2, 2, 2, 1], Verdict.Unreadable);
    }

    function test_less_than_two_thirds_could_not_read() public {
        Vote u = Vote.Unreadable;
        standing([u, u, u, Vote.Guilty, Vote.Clear], [2, 2, 1, 2, 1], Verdict.Void);
    }

    // Rulings and money

    /// What changed hands, relative to before the case.
    struct Purse {
        uint256 accuser;
        uint256 accused;
        uint256 supply;
    }

    function purses() private view returns (Purse memory) {
        return Purse(token.balanceOf(accuser), token.balanceOf(node), token.totalSupply());
    }

    function test_guilty() public {
        bytes32 id = court.caseId(digestOf("session", opened), EVIDENCE_CID);
        Purse memory before = purses();
        vm.expectEmit(address(court));
        emit ICourt.Opened(id, node, accuser, digestOf("session", opened), EVIDENCE_CID, BOND);
        is_(tryFor("session", Vote.Guilty), Verdict.Guilty);
        // 1 % of the stake: a quarter to the accuser, a quarter to the ten seats, half to the fire.
        assertEq(staking.nodes(node).stake, STAKE - 100 ether);
        assertEq(token.balanceOf(accuser), before.accuser + 25 ether);
        assertEq(token.balanceOf(address(court)), 25 ether);
        assertEq(token.totalSupply(), before.supply - 50 ether);
        assertEq(court.cases(id).purse, 2.5 ether);
        assertEq(staking.nodes(node).holds, 0);
        Record memory record = court.records(node);
        assertEq(record.convictedAt, block.timestamp);
        assertEq(record.slashedAt, block.timestamp);
        assertEq(record.slashedBps, 100);
        for (uint256 i = 0; i < JURORS; i++) {
            vm.expectEmit(address(court));
            emit ICourt.Settled(id, 0, juror(i), 5 ether, 0);
            court.settle(id, 0, juror(i));
            assertEq(token.balanceOf(juror(i)), 5 ether);
        }
        assertEq(token.balanceOf(address(court)), 0);
        vm.expectRevert(abi.encodeWithSelector(ICourt.HasSettled.selector, juror(0)));
        court.settle(id, 0, juror(0));
    }

    function test_clear() public {
        vm.prank(node);
        staking.setPayee(client);
        Purse memory before = purses();
        is_(tryFor("session", Vote.Clear), Verdict.Clear);
        assertEq(token.balanceOf(accuser), before.accuser - BOND);
        assertEq(token.balanceOf(client), BOND / 2); // the node's payee
        assertEq(token.balanceOf(address(court)), BOND / 2);
        assertEq(token.totalSupply(), before.supply);
        assertEq(staking.nodes(node).stake, STAKE);
        require(court.receiptClosed(digestOf("session", opened)), "still open");
    }

    function test_unreadable_burns_half_and_closes_nothing() public {
        Purse memory before = purses();
        is_(tryFor("session", Vote.Unreadable), Verdict.Unreadable);
        assertEq(token.balanceOf(accuser), before.accuser - BOND / 2);
        assertEq(token.balanceOf(node), before.accused);
        assertEq(token.balanceOf(address(court)), 0);
        assertEq(token.totalSupply(), before.supply - BOND / 2);
        open("session", opened, "readable evidence");
    }

    function test_void_costs_a_tenth_and_closes_nothing() public {
        uint256 time = block.timestamp;
        Purse memory before = purses();
        bytes32 id = open();
        draw(id);
        Vote g = Vote.Guilty;
        vote(id, [g, g, Vote.Clear, Vote.Clear, Vote.Abstain], [2, 2, 2, 2, 2]);
        is_(rule("session", time, EVIDENCE_CID), Verdict.Void);
        assertEq(token.balanceOf(accuser), before.accuser - BOND / 10);
        assertEq(court.cases(id).purse, BOND / 10 / 8); // eight seats did not abstain
        court.settle(id, 0, juror(0));
        court.settle(id, 0, juror(4));
        assertEq(token.balanceOf(juror(0)), BOND / 10 / 4);
        assertEq(token.balanceOf(juror(4)), 0);
        assertEq(staking.nodes(juror(2)).stake, JUROR_UNITS * unitSize);
        open("session", time, "other evidence");
    }

    function test_who_could_not_read_shares_in_no_void_pot() public {
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id);
        vote(id, [Vote.Guilty, Vote.Guilty, Vote.Clear, Vote.Clear, Vote.Unreadable], [2, 2, 2, 2, 2]);
        is_(rule("session", time, EVIDENCE_CID), Verdict.Void);
        assertEq(court.cases(id).purse, BOND / 10 / 8);
        court.settle(id, 0, juror(4));
        assertEq(token.balanceOf(juror(4)), 0);
        assertEq(staking.nodes(juror(4)).stake, JUROR_UNITS * unitSize);
    }

    function test_a_void_of_abstentions_burns_its_tenth() public {
        Purse memory before = purses();
        is_(tryFor("session", Vote.Abstain), Verdict.Void);
        assertEq(token.balanceOf(accuser), before.accuser - BOND / 10);
        assertEq(token.totalSupply(), before.supply - BOND / 10);
    }

    /// A case about nothing, opened to report everybody: half of the bond burns, the fines burn, nobody gains.
    function test_no_quorum_in_any_round_burns_half_and_reports_pay_nothing() public {
        uint256 time = block.timestamp;
        Purse memory before = purses();
        bytes32 id = open();
        uint256 fines;
        for (uint256 round = 0; round < 3; round++) {
            draw(id);
            // One seat votes in each round: it shares in nothing.
            commit(id, 0, Vote.Guilty, 1);
            vm.warp(court.cases(id).commitEnd);
            reveal(id, 0, Vote.Guilty);
            vm.warp(court.cases(id).commitEnd + terms.reveal);
            for (uint256 i = 1; i < JURORS; i++) {
                uint256[] memory seats = seatsOf(id, juror(i));
                vm.prank(accuser);
                court.report(id, round, juror(i), seats);
                fines += seats.length * FINE;
            }
            if (round < 2) court.redraw(id);
        }
        is_(rule("session", time, EVIDENCE_CID), Verdict.Missed);
        assertEq(token.balanceOf(accuser), before.accuser - BOND / 2);
        assertEq(token.totalSupply(), before.supply - BOND / 2 - fines);
        assertEq(token.balanceOf(address(court)), 0);
        court.settle(id, 0, juror(0));
        assertEq(token.balanceOf(juror(0)), 0);
    }

    function test_each_further_case_over_a_receipt_doubles_the_bond_three_times() public {
        bytes32 receipt = digestOf("session", opened);
        for (uint256 i = 0; i < 5; i++) {
            uint256 times = i < 3 ? i : 3;
            assertEq(court.doublings(receipt), times);
            uint256 purse = token.balanceOf(accuser);
            bytes32 id = open("session", opened, bytes32(i + 1));
            assertEq(purse - token.balanceOf(accuser), BOND << times);
            assertEq(court.cases(id).purse, BOND << times);
            assertEq(court.appealBond(id), BOND << times + 1);
        }
        assertEq(court.doublings(digestOf("session 2", opened)), 0);
    }

    // Nobody draws

    function test_a_case_that_nobody_draws_ends_after_four_evidence_periods() public {
        Purse memory before = purses();
        open();
        bytes32 receipt = digestOf("session", opened);
        uint256 end = opened + 4 * terms.evidence;
        vm.warp(end - 1);
        outOfTime(end, type(uint256).max);
        court.rule(receipt, EVIDENCE_CID);
        vm.warp(end);
        is_(ruleAndEnforce(receipt, EVIDENCE_CID), Verdict.Missed);
        assertEq(staking.nodes(node).holds, 0);
        assertEq(token.balanceOf(accuser), before.accuser - BOND / 2);
        assertEq(token.totalSupply(), before.supply - BOND / 2);
        assertEq(token.balanceOf(address(court)), 0);
    }

    function test_an_appeal_that_nobody_draws_leaves_the_verdict() public {
        bytes32 id = open();
        draw(id);
        vote(id, Vote.Guilty);
        appeal(id, client, 2 * BOND);
        bytes32 receipt = digestOf("session", opened);
        uint256 end = court.cases(id).commitEnd + 4 * terms.evidence;
        vm.warp(end - 1);
        outOfTime(end, type(uint256).max);
        court.rule(receipt, EVIDENCE_CID);
        vm.warp(end);
        is_(ruleAndEnforce(receipt, EVIDENCE_CID), Verdict.Guilty);
        assertEq(staking.nodes(node).stake, STAKE - STAKE / 100);
        assertEq(token.balanceOf(client), 0);
    }

    function test_what_seats_cannot_share_burns() public {
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id);
        Vote c = Vote.Clear;
        vote(id, [c, c, c, c, Vote.Guilty], [2, 2, 2, 1, 1]);
        uint256 supply = token.totalSupply();
        rule("session", time, EVIDENCE_CID);
        uint256 share = BOND / 2 / 7;
        assertEq(court.cases(id).purse, share);
        assertEq(supply - token.totalSupply(), BOND / 2 - 7 * share);
        require(supply != token.totalSupply(), "nothing was left over");
    }

    function test_a_ruling_waits_for_appeals() public {
        bytes32 id = open();
        draw(id);
        vote(id, Vote.Guilty);
        uint256 end = opened + terms.commit + terms.reveal + terms.appeal;
        vm.warp(end - 1);
        bytes32 receipt = digestOf("session", opened);
        outOfTime(end, type(uint256).max);
        court.rule(receipt, EVIDENCE_CID);
        vm.warp(end);
        court.rule(receipt, EVIDENCE_CID);
        wrongState(State.Ruled, State.Drawn);
        court.rule(receipt, EVIDENCE_CID);
        assertEq(id, court.caseId(receipt, EVIDENCE_CID));
    }

    // Enforcing

    /// A case over a receipt of `time`, ruled and not enforced.
    function ruledOnly(bytes32 sessionId, uint256 time, Vote same) private returns (bytes32 id) {
        opened = block.timestamp;
        id = open(sessionId, time, EVIDENCE_CID);
        draw(id);
        vote(id, same);
        vm.warp(block.timestamp + terms.appeal);
        court.rule(digestOf(sessionId, time), EVIDENCE_CID);
    }

    function test_a_ruling_moves_no_money_and_enforcing_it_does_once() public {
        bytes32 id = open();
        wrongState(State.Open, State.Ruled);
        court.enforce(id);
        draw(id);
        wrongState(State.Drawn, State.Ruled);
        court.enforce(id);
        vote(id, Vote.Guilty);
        Purse memory before = purses();
        vm.warp(block.timestamp + terms.appeal);
        bytes32 receipt = digestOf("session", opened);
        vm.expectEmit(address(court));
        emit ICourt.Ruled(id, node, Verdict.Guilty, 100);
        is_(court.rule(receipt, EVIDENCE_CID), Verdict.Guilty);
        assertEq(court.cases(id).slashBps, 100);
        assertEq(court.cases(id).purse, BOND);
        assertEq(token.balanceOf(address(court)), BOND);
        assertEq(token.balanceOf(accuser), before.accuser);
        assertEq(token.totalSupply(), before.supply);
        assertEq(staking.nodes(node).stake, STAKE);
        assertEq(staking.nodes(node).holds, 1);
        vm.expectEmit(address(court));
        emit ICourt.Enforced(id, 100 ether, 25 ether, 2.5 ether);
        vm.prank(reporter); // whoever calls
        court.enforce(id);
        assertEq(token.balanceOf(accuser), before.accuser + BOND + 25 ether);
        assertEq(token.balanceOf(reporter), 0);
        assertEq(staking.nodes(node).holds, 0);
        wrongState(State.Enforced, State.Ruled);
        court.enforce(id);
        wrongState(State.Enforced, State.Drawn);
        court.rule(receipt, EVIDENCE_CID);
    }

    function test_the_accused_cannot_leave_between_ruling_and_slash() public {
        vm.prank(node);
        staking.unbond(STAKE);
        vm.warp(opened + unbonding - 2 days);
        bytes32 id = ruledOnly("session", block.timestamp, Vote.Guilty);
        vm.expectRevert(abi.encodeWithSelector(IStaking.Held.selector, 1));
        vm.prank(node);
        staking.withdraw();
        court.enforce(id);
        vm.prank(node);
        staking.withdraw();
        assertEq(token.balanceOf(node), STAKE - STAKE / 100);
    }

    /// The record, the session and the cap count from the ruling on: who puts off the slash gains nothing by it.
    function test_what_follows_from_a_ruling_does_not_wait_for_the_slash() public {
        uint256 time = block.timestamp;
        bytes32 first = ruledOnly("session 1", time, Vote.Guilty);
        uint256 ruledAt = block.timestamp;
        assertEq(court.records(node).convictedAt, ruledAt);
        Receipt memory r = receiptOf("session 1", ruledAt);
        bytes memory signature = signed(r);
        vm.expectRevert(abi.encodeWithSelector(ICourt.SessionClosed.selector, node, bytes32("session 1")));
        court.open(r, signature, EVIDENCE_CID);
        assertEq(court.bondFor(node, ruledAt + 1), STAKE / 20);
        vm.warp(ruledAt + 1);
        bytes32 second = ruledOnly("session 2", ruledAt + 1, Vote.Guilty);
        assertEq(court.records(node).slashedBps, 1100);
        assertEq(staking.nodes(node).holds, 2);
        // In any order, each takes its part of what is there.
        court.enforce(second);
        assertEq(staking.nodes(node).stake, STAKE * 9 / 10);
        court.enforce(first);
        assertEq(staking.nodes(node).stake, STAKE * 9 / 10 * 99 / 100);
        assertEq(staking.nodes(node).holds, 0);
        assertEq(token.balanceOf(address(court)), court.cases(first).purse * 10 + court.cases(second).purse * 10);
    }

    function test_a_cleared_receipt_is_closed_by_the_ruling_and_paid_for_by_its_enforcement() public {
        bytes32 id = ruledOnly("session", block.timestamp, Vote.Clear);
        require(court.receiptClosed(digestOf("session", opened)), "still open");
        assertEq(token.balanceOf(node), 0);
        court.enforce(id);
        assertEq(token.balanceOf(node), BOND / 2);
    }

    // Grading

    function test_a_second_conviction_costs_ten_times_as_much_if_signed_after_the_first() public {
        tryFor("session 1", Vote.Guilty);
        uint256 ruledAt = court.records(node).convictedAt;
        uint256 stake = staking.nodes(node).stake;
        // Signed in the second of the ruling: not after it.
        assertEq(court.bondFor(node, ruledAt), stake / 200);
        assertEq(court.bondFor(node, ruledAt + 1), stake / 20);
        vm.warp(ruledAt + 1);
        tryFor("session 2", Vote.Guilty);
        assertEq(staking.nodes(node).stake, stake - stake / 10);
        assertEq(court.records(node).convictedAt, ruledAt);
        assertEq(court.records(node).slashedBps, 1100);
    }

    function test_receipts_of_before_the_first_ruling_stay_at_one_percent() public {
        uint256 time = block.timestamp;
        tryFor("session 1", Vote.Guilty);
        uint256 stake = staking.nodes(node).stake;
        opened = block.timestamp;
        bytes32 id = open("session 2", time, EVIDENCE_CID);
        draw(id);
        vote(id, Vote.Guilty);
        rule("session 2", time, EVIDENCE_CID);
        assertEq(staking.nodes(node).stake, stake - stake / 100);
    }

    function test_one_conviction_per_session() public {
        uint256 time = block.timestamp;
        bytes32 second = open("session", time, "other evidence");
        draw(second);
        vote(second, Vote.Guilty);
        vm.warp(time);
        tryFor("session", Vote.Guilty);
        Purse memory before = purses();
        uint256 stake = staking.nodes(node).stake;
        is_(rule("session", time, "other evidence"), Verdict.Guilty);
        assertEq(staking.nodes(node).stake, stake);
        assertEq(token.balanceOf(accuser), before.accuser + BOND); // it was right
        Receipt memory r = receiptOf("session", time);
        r.first = 32;
        bytes memory signature = signed(r);
        vm.expectRevert(abi.encodeWithSelector(ICourt.SessionClosed.selector, node, bytes32("session")));
        court.open(r, signature, EVIDENCE_CID);
        assertEq(staking.nodes(node).holds, 0);
    }

    function test_a_cleared_receipt_is_closed() public {
        uint256 time = block.timestamp;
        bytes32 second = open("session", time, "other evidence");
        draw(second);
        vote(second, Vote.Guilty);
        vm.warp(time);
        tryFor("session", Vote.Clear);
        Receipt memory r = receiptOf("session", time);
        bytes memory signature = signed(r);
        vm.expectRevert(abi.encodeWithSelector(ICourt.ReceiptClosed.selector, court.digestOf(r)));
        court.open(r, signature, "third evidence");
        // The case that was open beside it convicts nobody any more.
        rule("session", time, "other evidence");
        assertEq(staking.nodes(node).stake, STAKE);
        assertEq(court.records(node).convictedAt, 0);
    }

    function test_at_most_thirty_percent_within_the_evidence_period() public {
        tryFor("session 1", Vote.Guilty); // 1 %
        for (uint256 i = 2; i <= 4; i++) {
            vm.warp(block.timestamp + 1);
            tryFor(bytes32(i), Vote.Guilty); // 10 %, 10 %, 9 %
        }
        assertEq(court.records(node).slashedBps, 3000);
        assertEq(staking.nodes(node).stake, STAKE * 99 / 100 * 9 / 10 * 9 / 10 * 91 / 100);
        uint256 last = block.timestamp;
        assertEq(court.bondFor(node, last), 0);
        vm.warp(last + terms.evidence - 1);
        Receipt memory r = receiptOf("session 5", last + 1);
        bytes memory signature = signed(r);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NothingToWin.selector, node));
        court.open(r, signature, EVIDENCE_CID);
        vm.warp(last + terms.evidence);
        opened = block.timestamp;
        assertEq(court.bondFor(node, last + 1), staking.nodes(node).stake / 20);
        tryFor("session 6", Vote.Guilty);
        assertEq(court.records(node).slashedBps, 1000);
    }

    /// Slashes add up while they come within EVIDENCE of each other, so the sum of no EVIDENCE is above the cap.
    function test_slashes_add_up_to_the_second() public {
        tryFor("session 1", Vote.Guilty);
        uint256 first = court.records(node).slashedAt;
        uint256 length = terms.commit + terms.reveal + terms.appeal;
        vm.warp(first + terms.evidence - length - 1);
        tryFor("session 2", Vote.Guilty);
        assertEq(block.timestamp, first + terms.evidence - 1);
        assertEq(court.records(node).slashedBps, 1100);
        vm.warp(first + 2 * terms.evidence - length - 1);
        tryFor("session 3", Vote.Guilty);
        assertEq(court.records(node).slashedBps, 1000);
    }

    // A slash that reaches the cap while other cases are open leaves them without one.
    function test_a_conviction_beyond_the_cap_slashes_nothing() public {
        tryFor("session 1", Vote.Guilty);
        vm.warp(block.timestamp + 1);
        uint256 time = block.timestamp;
        opened = time;
        bytes32[4] memory ids;
        for (uint256 i = 0; i < 4; i++) {
            ids[i] = open(bytes32(i + 10), time, EVIDENCE_CID);
        }
        for (uint256 i = 0; i < 4; i++) {
            draw(ids[i]);
        }
        for (uint256 i = 0; i < 4; i++) {
            vm.warp(time);
            vote(ids[i], Vote.Guilty);
        }
        uint256 purse = token.balanceOf(accuser);
        uint256 bond = court.cases(ids[3]).purse;
        for (uint256 i = 0; i < 4; i++) {
            if (i == 3) purse = token.balanceOf(accuser);
            rule(bytes32(i + 10), time, EVIDENCE_CID);
        }
        assertEq(court.records(node).slashedBps, 3000);
        assertEq(token.balanceOf(accuser), purse + bond);
    }

    // Faults

    function test_a_fault_is_recorded_and_slashes_nothing() public {
        Purse memory before = purses();
        is_(tryFor("session", Vote.Fault), Verdict.Fault);
        assertEq(staking.nodes(node).stake, STAKE);
        assertEq(token.balanceOf(accuser), before.accuser - BOND / 10);
        assertEq(court.records(node).faultAt, block.timestamp);
        require(court.receiptClosed(digestOf("session", opened)), "still open");
    }

    function relapsesAt(uint256 time) private {
        vm.warp(time - terms.commit - terms.reveal - terms.appeal);
        tryFor("session 2", Vote.Fault);
        assertEq(block.timestamp, time);
    }

    function test_a_second_fault_within_thirty_days_is_a_conviction() public {
        tryFor("session 1", Vote.Fault);
        relapsesAt(block.timestamp + terms.relapse - 1);
        assertEq(staking.nodes(node).stake, STAKE - STAKE / 100);
        assertEq(court.records(node).convictedAt, block.timestamp);
        assertEq(court.records(node).faultAt, block.timestamp);
    }

    function test_after_thirty_days_a_fault_is_a_first_one() public {
        tryFor("session 1", Vote.Fault);
        relapsesAt(block.timestamp + terms.relapse);
        assertEq(staking.nodes(node).stake, STAKE);
        assertEq(court.records(node).convictedAt, 0);
        assertEq(court.records(node).faultAt, block.timestamp);
    }

    function test_two_faults_of_one_session_are_one() public {
        uint256 time = block.timestamp;
        tryFor("session", Vote.Fault);
        uint256 faultAt = court.records(node).faultAt;
        time += 3 days;
        vm.warp(time);
        opened = time;
        bytes32 id = open("session", time, EVIDENCE_CID);
        draw(id);
        vote(id, Vote.Fault);
        rule("session", time, EVIDENCE_CID);
        assertEq(staking.nodes(node).stake, STAKE);
        assertEq(court.records(node).faultAt, faultAt);
    }

    function test_a_fault_beside_an_open_case_over_the_same_receipt_counts_once() public {
        uint256 time = block.timestamp;
        bytes32 second = open("session", time, "other evidence");
        draw(second);
        vote(second, Vote.Fault);
        vm.warp(time);
        tryFor("session", Vote.Fault);
        uint256 faultAt = court.records(node).faultAt;
        vm.warp(block.timestamp + 1);
        rule("session", time, "other evidence");
        assertEq(court.records(node).faultAt, faultAt);
        assertEq(staking.nodes(node).stake, STAKE);
    }

    function faultSignedAt(uint256 time) private {
        opened = block.timestamp;
        bytes32 id = open("session 2", time, EVIDENCE_CID);
        draw(id);
        vote(id, Vote.Fault);
        rule("session 2", time, EVIDENCE_CID);
    }

    function test_faults_signed_before_the_first_was_found_are_one() public {
        tryFor("session 1", Vote.Fault);
        uint256 faultAt = court.records(node).faultAt;
        vm.warp(faultAt + 1);
        faultSignedAt(faultAt);
        assertEq(staking.nodes(node).stake, STAKE);
        assertEq(court.records(node).convictedAt, 0);
        // It does not move the day from which on relapses count.
        assertEq(court.records(node).faultAt, faultAt);
    }

    function test_a_fault_signed_after_the_first_was_found_is_a_relapse() public {
        tryFor("session 1", Vote.Fault);
        uint256 faultAt = court.records(node).faultAt;
        vm.warp(faultAt + 1);
        faultSignedAt(faultAt + 1);
        assertEq(staking.nodes(node).stake, STAKE - STAKE / 100);
        assertEq(court.records(node).convictedAt, block.timestamp);
    }

    // Appeals

    function appeal(bytes32 id, address who, uint256 bond) private {
        token.transfer(who, bond);
        vm.prank(who);
        token.approve(address(court), bond);
        vm.prank(who);
        court.appeal(id);
    }

    function test_an_appeal_that_changes_the_verdict_is_paid_back() public {
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id);
        vote(id, Vote.Guilty);
        assertEq(court.appealBond(id), 2 * BOND);
        token.transfer(client, 2 * BOND);
        vm.prank(client);
        token.approve(address(court), 2 * BOND);
        vm.expectEmit(address(court));
        emit ICourt.Appealed(id, 0, client, Verdict.Guilty, 2 * BOND);
        vm.prank(client);
        court.appeal(id);
        assertEq(court.appeals(id, 0).by, client);
        assertEq(court.appealBond(id), 4 * BOND);
        assertEq(court.cases(id).seedBlock, block.number + terms.lookahead);
        draw(id);
        Vote c = Vote.Clear;
        vote(id, [c, c, c, c, c], [4, 4, 4, 4, 4]);
        is_(rule("session", time, EVIDENCE_CID), Verdict.Clear);
        assertEq(token.balanceOf(client), 2 * BOND);
        assertEq(court.cases(id).purse, BOND / 2 / 20); // twenty seats said clear, all of the second round
        assertEq(staking.nodes(node).stake, STAKE);
        // Who convicted the innocent is fined.
        vm.prank(reporter);
        court.settle(id, 0, juror(0));
        assertEq(staking.nodes(juror(0)).stake, JUROR_UNITS * unitSize - 2 * FINE);
        assertEq(token.balanceOf(reporter), 0); // fines burn
        court.settle(id, 1, juror(0));
        assertEq(token.balanceOf(juror(0)), 4 * (BOND / 2 / 20));
    }

    function test_an_appeal_that_changes_nothing_pays_the_jurors() public {
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id);
        vote(id, Vote.Guilty);
        appeal(id, client, 2 * BOND);
        draw(id);
        Vote g = Vote.Guilty;
        vote(id, [g, g, g, g, g], [4, 4, 4, 4, 4]);
        rule("session", time, EVIDENCE_CID);
        assertEq(token.balanceOf(client), 0);
        assertEq(court.cases(id).purse, (25 ether + 2 * BOND) / 30); // the seats of both rounds
        court.settle(id, 0, juror(0));
        court.settle(id, 1, juror(0));
        assertEq(token.balanceOf(juror(0)), 6 * ((25 ether + 2 * BOND) / 30));
    }

    function test_two_appeals_and_no_third() public {
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id);
        vote(id, Vote.Guilty);
        appeal(id, client, 2 * BOND);
        draw(id);
        Vote c = Vote.Clear;
        vote(id, [c, c, c, c, c], [4, 4, 4, 4, 4]);
        appeal(id, stranger, 4 * BOND);
        draw(id, 7, 1000);
        Vote g = Vote.Guilty;
        vote(id, [g, g, g, g, g], [7, 7, 7, 7, 7]);
        vm.expectRevert(abi.encodeWithSelector(ICourt.LastRound.selector, 2));
        court.appeal(id);
        vm.expectRevert(abi.encodeWithSelector(ICourt.LastRound.selector, 2));
        court.redraw(id);
        // No appeal is possible, so none is waited for.
        is_(ruleAndEnforce(digestOf("session", time), EVIDENCE_CID), Verdict.Guilty);
        assertEq(block.timestamp, time + 3 * (terms.commit + terms.reveal));
        assertEq(token.balanceOf(client), 0); // guilty it was
        assertEq(token.balanceOf(stranger), 4 * BOND);
        assertEq(court.cases(id).purse, (25 ether + 2 * BOND) / 45);
    }

    function test_appeals_are_made_between_two_seconds() public {
        bytes32 id = open();
        draw(id);
        for (uint256 i = 0; i < JURORS; i++) {
            commit(id, i, Vote.Clear, 2);
        }
        vm.warp(court.cases(id).commitEnd);
        for (uint256 i = 0; i < JURORS; i++) {
            reveal(id, i, Vote.Clear);
        }
        uint256 start = opened + terms.commit + terms.reveal;
        vm.warp(start - 1);
        outOfTime(start, start + terms.appeal);
        court.appeal(id);
        vm.warp(start + terms.appeal);
        outOfTime(start, start + terms.appeal);
        court.appeal(id);
        vm.warp(start);
        token.approve(address(court), type(uint256).max);
        court.appeal(id);
    }

    function test_the_last_second_for_an_appeal() public {
        bytes32 id = open();
        draw(id);
        vote(id, Vote.Clear);
        vm.warp(opened + terms.commit + terms.reveal + terms.appeal - 1);
        token.approve(address(court), type(uint256).max);
        court.appeal(id);
    }

    // Quorum missed

    function test_a_missed_quorum_draws_more_seats() public {
        bytes32 id = open();
        draw(id);
        vote(id, [Vote.Guilty, Vote.Guilty, Vote.Guilty, Vote.Guilty, Vote.None], [2, 2, 2, 1, 0]);
        vm.expectRevert(abi.encodeWithSelector(ICourt.QuorumMissed.selector, 0));
        court.appeal(id);
        bytes32 receipt = digestOf("session", opened);
        vm.warp(opened + terms.commit + terms.reveal + terms.appeal);
        vm.expectRevert(abi.encodeWithSelector(ICourt.QuorumMissed.selector, 0));
        court.rule(receipt, EVIDENCE_CID);
        vm.expectEmit(address(court));
        emit ICourt.Seeding(id, 1, block.number + terms.lookahead);
        court.redraw(id);
        Case memory c = court.cases(id);
        assertEq(c.round, 1);
        assertEq(c.tally, 0);
        assertEq(c.earlier, 7);
        wrongState(State.Open, State.Drawn);
        court.redraw(id);
    }

    function test_a_redraw_waits_for_the_reveals() public {
        bytes32 id = open();
        draw(id);
        uint256 end = opened + terms.commit + terms.reveal;
        vm.warp(end - 1);
        outOfTime(end, type(uint256).max);
        court.redraw(id);
        vm.warp(end);
        court.redraw(id);
    }

    function test_a_met_quorum_is_not_redrawn() public {
        bytes32 id = open();
        draw(id);
        vote(id, Vote.Clear);
        vm.expectRevert(abi.encodeWithSelector(ICourt.QuorumMet.selector, 0));
        court.redraw(id);
    }

    function test_a_last_round_without_quorum_leaves_the_verdict_before_it() public {
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id);
        vote(id, Vote.Guilty);
        appeal(id, client, 2 * BOND);
        draw(id);
        vm.warp(court.cases(id).commitEnd + terms.reveal);
        court.redraw(id);
        draw(id);
        uint256 end = court.cases(id).commitEnd + terms.reveal;
        bytes32 receipt = digestOf("session", time);
        vm.warp(end - 1);
        outOfTime(end, type(uint256).max);
        court.rule(receipt, EVIDENCE_CID);
        vm.warp(end);
        is_(ruleAndEnforce(receipt, EVIDENCE_CID), Verdict.Guilty);
        assertEq(staking.nodes(node).stake, STAKE - STAKE / 100);
        assertEq(token.balanceOf(client), 0); // the appeal changed nothing
        assertEq(court.cases(id).purse, (25 ether + 2 * BOND) / 10);
    }

    function test_of_two_verdicts_the_later_one_stands() public {
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id);
        vote(id, Vote.Guilty);
        appeal(id, client, 2 * BOND);
        draw(id);
        Vote c = Vote.Clear;
        vote(id, [c, c, c, c, c], [4, 4, 4, 4, 4]);
        appeal(id, stranger, 4 * BOND);
        draw(id);
        vm.warp(court.cases(id).commitEnd + terms.reveal);
        is_(rule("session", time, EVIDENCE_CID), Verdict.Clear);
        assertEq(staking.nodes(node).stake, STAKE);
        assertEq(token.balanceOf(client), 2 * BOND);
        assertEq(token.balanceOf(stranger), 0);
        assertEq(court.cases(id).purse, (BOND / 2 + 4 * BOND) / 20);
    }

    // Silence

    function test_silence_is_fined() public {
        bytes32 id = open();
        draw(id);
        commit(id, 0, Vote.Clear, 2);
        uint256[] memory seats = seatsOf(id, juror(0));
        uint256 end = opened + terms.commit + terms.reveal;
        vm.warp(end - 1);
        outOfTime(end, type(uint256).max);
        court.report(id, 0, juror(0), seats);
        vm.warp(end);
        uint256 supply = token.totalSupply();
        // Committed, but not revealed: all of its seats were silent.
        vm.expectEmit(address(court));
        emit ICourt.Silent(id, 0, juror(0), seats.length);
        vm.prank(reporter);
        court.report(id, 0, juror(0), seats);
        assertEq(staking.nodes(juror(0)).stake, JUROR_UNITS * unitSize - seats.length * FINE);
        assertEq(token.balanceOf(reporter), 0);
        assertEq(supply - token.totalSupply(), seats.length * FINE);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotSilent.selector, juror(0), seats.length));
        court.report(id, 0, juror(0), seats);
    }

    function test_a_report_in_parts_shields_nobody() public {
        bytes32 id = open();
        draw(id);
        uint256[] memory seats = seatsOf(id, juror(3));
        vm.warp(opened + terms.commit + terms.reveal);
        court.report(id, 0, juror(3), firstOf(seats, 1));
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotSilent.selector, juror(3), 1));
        court.report(id, 0, juror(3), firstOf(seats, 1));
        vm.prank(reporter);
        court.report(id, 0, juror(3), seats);
        assertEq(staking.nodes(juror(3)).stake, JUROR_UNITS * unitSize - seats.length * FINE);
        assertEq(token.balanceOf(reporter), 0);
    }

    function test_who_reveals_one_of_its_seats_is_silent_for_the_others() public {
        bytes32 id = open();
        draw(id);
        uint256[] memory seats = seatsOf(id, juror(0));
        commit(id, 0, Vote.Clear, 1);
        vm.warp(court.cases(id).commitEnd);
        reveal(id, 0, Vote.Clear);
        vm.warp(opened + terms.commit + terms.reveal);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotSilent.selector, juror(0), 1));
        court.report(id, 0, juror(0), firstOf(seats, 1));
        court.report(id, 0, juror(0), seats);
        assertEq(staking.nodes(juror(0)).stake, JUROR_UNITS * unitSize - (seats.length - 1) * FINE);
    }

    function test_a_report_proves_its_seats() public {
        bytes32 id = open();
        uint256[] memory none = new uint256[](1);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotDrawn.selector, 0));
        court.report(id, 0, juror(0), none);
        draw(id);
        vm.warp(opened + terms.commit + terms.reveal);
        while (court.wins(id, 0, juror(0), none[0])) none[0]++;
        vm.expectRevert(abi.encodeWithSelector(ICourt.NoSeat.selector, juror(0), none[0]));
        court.report(id, 0, juror(0), none);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotSilent.selector, juror(0), 0));
        court.report(id, 0, juror(0), new uint256[](0));
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotDrawn.selector, 1));
        court.report(id, 1, juror(0), none);
    }

    function test_silence_of_an_earlier_round_is_fined_later() public {
        bytes32 id = open();
        draw(id);
        uint256[] memory seats = seatsOf(id, juror(0));
        vm.warp(court.cases(id).commitEnd + terms.reveal);
        court.redraw(id);
        court.report(id, 0, juror(0), seats); // while the next round waits for its seed
        draw(id);
        vm.warp(opened + 6 * epoch);
        // Its units change, and are still known.
        staking.stake(juror(1), minStake);
        seats = winning(court.seeds(id, 0), 0, juror(1));
        court.report(id, 0, juror(1), seats);
        assertEq(staking.nodes(juror(1)).stake, JUROR_UNITS * unitSize + minStake - seats.length * FINE);
    }

    function test_who_staked_the_minimum_has_a_unit_left_after_fines() public {
        serving(stranger, llama, minStake);
        opened += epoch;
        vm.warp(opened);
        assertEq(staking.unitsAt(stranger, opened), 2);
        bytes32 id = open();
        uint256 randao = 1;
        while (winning(keccak256(abi.encode(randao, id, uint256(0))), 0, stranger).length != 2) randao++;
        court.draw(id, mine(id, randao));
        vm.warp(opened + terms.commit + terms.reveal);
        court.report(id, 0, stranger, seatsOf(id, stranger));
        assertEq(staking.nodes(stranger).stake, minStake - 2 * FINE);
        vm.warp(opened + 2 * epoch);
        assertEq(staking.unitsAt(stranger, block.timestamp), 1);
    }

    function test_a_juror_that_left_is_still_fined() public {
        bytes32 id = open();
        vm.prank(juror(0));
        staking.unbond(JUROR_UNITS * unitSize);
        draw(id);
        uint256[] memory seats = seatsOf(id, juror(0));
        vm.warp(opened + terms.commit + terms.reveal);
        court.report(id, 0, juror(0), seats);
        assertEq(staking.nodes(juror(0)).stake, JUROR_UNITS * unitSize - seats.length * FINE);
    }

    // Settling

    function test_only_ballots_of_enforced_cases_are_settled() public {
        bytes32 id = open();
        draw(id);
        vote(id, [Vote.Clear, Vote.Clear, Vote.Clear, Vote.Clear, Vote.None], [2, 2, 2, 2, 0]);
        wrongState(State.Drawn, State.Enforced);
        court.settle(id, 0, juror(0));
        vm.warp(opened + terms.commit + terms.reveal + terms.appeal);
        court.rule(digestOf("session", opened), EVIDENCE_CID);
        wrongState(State.Ruled, State.Enforced);
        court.settle(id, 0, juror(0));
        court.enforce(id);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotRevealed.selector, juror(4)));
        court.settle(id, 0, juror(4));
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotRevealed.selector, juror(0)));
        court.settle(id, 1, juror(0));
    }

    function settled(bytes32 id, uint256 i, uint256 paid, uint256 fined) private {
        vm.expectEmit(address(court));
        emit ICourt.Settled(id, 0, juror(i), paid, fined);
        court.settle(id, 0, juror(i));
    }

    function test_who_acquits_the_guilty_is_fined_who_could_not_tell_is_not() public {
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id, 4, 1000);
        vote(id, [Vote.Guilty, Vote.Guilty, Vote.Clear, Vote.Fault, Vote.Unreadable], [4, 4, 2, 1, 1]);
        is_(rule("session", time, EVIDENCE_CID), Verdict.Guilty);
        settled(id, 0, 4 * uint256(25 ether) / 8, 0);
        settled(id, 2, 0, 2 * FINE);
        settled(id, 3, 0, 0);
        settled(id, 4, 0, 0);
    }

    function test_a_fault_pays_who_found_it_or_more() public {
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id, 4, 1000);
        vote(id, [Vote.Fault, Vote.Guilty, Vote.Clear, Vote.Abstain, Vote.Unreadable], [4, 4, 2, 1, 1]);
        is_(rule("session", time, EVIDENCE_CID), Verdict.Fault);
        uint256 share = BOND / 10 / 8;
        settled(id, 0, 4 * share, 0);
        settled(id, 1, 4 * share, 0);
        settled(id, 2, 0, 2 * FINE);
        settled(id, 3, 0, 0);
        settled(id, 4, 0, 0);
    }

    function test_who_convicts_the_innocent_is_fined() public {
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id, 4, 1000);
        vote(id, [Vote.Clear, Vote.Clear, Vote.Guilty, Vote.Fault, Vote.Abstain], [4, 4, 2, 2, 1]);
        is_(rule("session", time, EVIDENCE_CID), Verdict.Clear);
        settled(id, 0, 4 * (BOND / 2 / 8), 0);
        settled(id, 2, 0, 2 * FINE);
        settled(id, 3, 0, 2 * FINE);
        settled(id, 4, 0, 0);
    }

    function test_unreadable_pays_and_fines_nobody() public {
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id, 4, 1000);
        vote(id, [Vote.Unreadable, Vote.Unreadable, Vote.Guilty, Vote.Clear, Vote.Fault], [4, 4, 1, 1, 2]);
        is_(rule("session", time, EVIDENCE_CID), Verdict.Unreadable);
        settled(id, 0, 0, 0);
        settled(id, 2, 0, 0);
        settled(id, 3, 0, 0);
        settled(id, 4, 0, 0);
    }

    // Self-dealing

    /// A node that accuses itself, judges itself with every seat and reports itself: it loses at least half of the slash.
    function testFuzz_who_accuses_itself_loses(uint8 choice, uint8 silent) public {
        Vote same = Vote(within(choice, 1, 5));
        uint256 jurors = within(silent, 0, 1) == 0 ? 5 : 4;
        uint256 before = wealth();
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id);
        vote(id, [same, same, same, same, same], [2, 2, 2, 2, jurors == 5 ? 2 : 0]);
        Verdict verdict = rule("session", time, EVIDENCE_CID);
        for (uint256 i = 0; i < jurors; i++) {
            vm.prank(accuser);
            court.settle(id, 0, juror(i));
        }
        if (jurors == 4) {
            uint256[] memory seats = winning(court.seeds(id, 0), 0, juror(4));
            vm.prank(accuser);
            court.report(id, 0, juror(4), seats);
        }
        uint256 after_ = wealth();
        require(after_ <= before, "somebody gained");
        if (verdict == Verdict.Guilty) assertLe(after_, before - STAKE / 100 / 2, "half burns");
        assertEq(token.balanceOf(address(court)), 0);
    }

    /// All that the accused, its jurors and its accuser have.
    function wealth() private view returns (uint256 sum) {
        sum = token.balanceOf(accuser) + token.balanceOf(node) + staking.nodes(node).stake;
        for (uint256 i = 0; i < JURORS; i++) {
            sum += token.balanceOf(juror(i)) + staking.nodes(juror(i)).stake;
        }
    }

    /// Any split of seats over votes: the verdict follows from the shares, the money adds up.
    function testFuzz_money_adds_up(uint8[5] memory choices, uint8[5] memory counts, uint8 start) public {
        uint256 supply = token.totalSupply();
        uint256 time = block.timestamp;
        bytes32 id = open();
        draw(id, 4, 1000);
        Vote[5] memory votes;
        uint256[6] memory sums;
        for (uint256 i = 0; i < JURORS; i++) {
            votes[i] = Vote(within(choices[i], 1, 5));
            counts[i] = uint8(within(counts[i], 0, 4));
            sums[uint8(votes[i])] += counts[i];
        }
        vote(id, votes, counts);
        Verdict verdict = court.standing(id);
        uint256 voting = sums[1] + sums[2] + sums[3] + sums[4];
        if (2 * (voting + sums[5]) < 15) {
            is_(verdict, Verdict.Missed);
            return;
        }
        if (verdict != Verdict.Void) assertLe(15, 2 * voting, "votes on the merits");
        if (verdict == Verdict.Guilty) assertLe(2 * voting, 3 * sums[1], "guilty");
        if (verdict == Verdict.Clear) assertLe(2 * voting, 3 * sums[2], "clear");
        if (verdict == Verdict.Fault) assertLe(2 * voting, 3 * (sums[1] + sums[3]), "fault");
        if (verdict == Verdict.Unreadable) assertLe(2 * voting, 3 * sums[4], "unreadable");
        rule("session", time, EVIDENCE_CID);
        if (verdict != Verdict.Guilty) assertEq(staking.nodes(node).stake, STAKE);
        for (uint256 k = 0; k < JURORS; k++) {
            uint256 i = (k + start) % JURORS;
            if (counts[i] != 0) court.settle(id, 0, juror(i));
        }
        assertEq(token.balanceOf(address(court)), 0);
        assertLe(token.totalSupply(), supply, "minted");
    }
}
