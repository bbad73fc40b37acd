// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IStaking, Node} from "../interfaces/IStaking.sol";
import {IToken} from "../interfaces/IToken.sol";
import {Invariants, World, vm} from "./World.sol";

contract StakingTest is World {
    uint256 private constant BIG = 10_000 ether;

    function revertsWith(bytes4 selector, uint256 a, uint256 b) private {
        vm.expectRevert(abi.encodeWithSelector(selector, a, b));
    }

    // Stake

    function test_anybody_stakes_for_a_node() public {
        vm.expectEmit(address(staking));
        emit IStaking.Staked(node, minStake, minStake);
        staking.stake(node, minStake);
        staking.stake(node, 1);
        assertEq(staking.nodes(node).stake, minStake + 1);
        assertEq(token.balanceOf(address(staking)), minStake + 1);
        assertEq(staking.active(node), 0); // serves nothing yet
    }

    function test_stake_below_the_minimum_is_refused() public {
        revertsWith(IStaking.TooLittle.selector, minStake - 1, minStake);
        staking.stake(node, minStake - 1);
    }

    /// The sums are not checked for overflow before the transfer, which no such amount survives.
    function test_an_amount_that_would_wrap_is_refused() public {
        serving(node, llama, minStake);
        uint256 all = type(uint256).max;
        uint256[7] memory amounts =
            [(1 << 104) + 1, 1 << 96, 1 << 255, token.CAP() + 1, all, all - minStake, all - minStake + 1];
        for (uint256 i = 0; i < 7; i++) {
            try staking.stake(node, amounts[i]) {
                revert("wrapped");
            } catch {}
        }
        assertEq(staking.nodes(node).stake, minStake);
        assertEq(staking.weights(llama), minStake);
    }

    // Keys

    function test_a_signer_is_bound_with_its_proof() public {
        bytes memory signature = proof(SESSION_KEY, node, block.timestamp);
        vm.expectEmit(address(staking));
        emit IStaking.SignerBound(node, session);
        vm.prank(node);
        staking.bind(session, block.timestamp, signature);
        assertEq(staking.nodeOf(session), node);
    }

    function test_a_signer_is_bound_for_good() public {
        vm.prank(node);
        staking.bind(session, START, proof(SESSION_KEY, node, START));
        bytes memory again = proof(SESSION_KEY, stranger, START);
        vm.expectRevert(abi.encodeWithSelector(IStaking.KeyTaken.selector, session, node));
        vm.prank(stranger);
        staking.bind(session, START, again);
        // A second key does not free the first.
        vm.prank(node);
        staking.bind(client, START, proof(CLIENT_KEY, node, START));
        assertEq(staking.nodeOf(session), node);
    }

    function test_a_proof_ends_with_its_deadline() public {
        bytes memory signature = proof(SESSION_KEY, node, START);
        vm.warp(START + 1);
        revertsWith(IStaking.Expired.selector, START + 1, START);
        vm.prank(node);
        staking.bind(session, START, signature);
    }

    function test_nobody_squats_a_rivals_key() public {
        bytes memory signature = proof(STRANGER_KEY, stranger, START);
        vm.expectRevert(abi.encodeWithSelector(IStaking.BadProof.selector, stranger, session));
        vm.prank(stranger);
        staking.bind(session, START, signature);
        // A proof made for one node is no proof for another.
        signature = proof(SESSION_KEY, node, START);
        vm.prank(stranger);
        try staking.bind(session, START, signature) {
            revert("bound");
        } catch {}
    }

    function test_malformed_proofs_are_refused() public {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(SESSION_KEY, bindDigest(node, START));
        uint256 order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141;
        refused(abi.encodePacked(r, bytes32(order - uint256(s)), uint8(55 - v)));
        refused(abi.encodePacked(r, s, uint8(v - 27)));
        refused(abi.encodePacked(r, bytes32(uint256(s) | (uint256(v - 27) << 255))));
        refused(new bytes(65));
        refused("");
    }

    function refused(bytes memory signature) private {
        vm.expectRevert(abi.encodeWithSelector(IStaking.BadProof.selector, address(0), session));
        vm.prank(node);
        staking.bind(session, START, signature);
    }

    function test_the_payee_is_the_node_until_it_names_one() public {
        assertEq(staking.payeeOf(node), node);
        vm.expectEmit(address(staking));
        emit IStaking.PayeeSet(node, client);
        vm.prank(node);
        staking.setPayee(client);
        assertEq(staking.payeeOf(node), client);
        vm.prank(node);
        staking.setPayee(address(0));
        assertEq(staking.payeeOf(node), node);
    }

    // Serving

    function test_a_node_serves_a_span() public {
        staking.stake(node, minStake);
        vm.expectEmit(address(staking));
        emit IStaking.Serving(node, llama, 2, 8, client, 5 gwei, "tcp:1.2.3.4:5");
        vm.prank(node);
        staking.serve(llama, 2, 8, 5 gwei, "tcp:1.2.3.4:5", client);
        Node memory n = staking.nodes(node);
        assertEq(n.model, llama);
        assertEq(n.start, 2);
        assertEq(n.end, 8);
        assertEq(staking.active(node), minStake);
        assertEq(staking.weights(llama), minStake);
    }

    function test_a_span_lies_within_the_model() public {
        staking.stake(node, minStake);
        badRange(llama, 2, 2, 8);
        badRange(llama, 3, 2, 8);
        badRange(llama, 0, 9, 8);
        badRange(bert, 0, 5, 4);
        badRange("unknown", 0, 1, 0);
        vm.prank(node);
        staking.serve(llama, 7, 8, 0, "", node);
    }

    function badRange(bytes32 model, uint16 start, uint16 end, uint256 layers) private {
        vm.expectRevert(abi.encodeWithSelector(IStaking.BadRange.selector, start, end, layers));
        vm.prank(node);
        staking.serve(model, start, end, 0, "", node);
    }

    function test_serving_takes_the_minimum() public {
        revertsWith(IStaking.TooLittle.selector, 0, minStake);
        vm.prank(node);
        staking.serve(llama, 0, 1, 0, "", node);
        staking.stake(node, minStake);
        staking.slash(node, 2, 0, address(0));
        revertsWith(IStaking.TooLittle.selector, minStake - 2, minStake);
        vm.prank(node);
        staking.serve(llama, 0, 1, 0, "", node);
    }

    function test_an_endpoint_is_short() public {
        staking.stake(node, minStake);
        vm.prank(node);
        staking.serve(llama, 0, 1, 0, new bytes(256), node);
        revertsWith(IStaking.EndpointTooLong.selector, 257, 256);
        vm.prank(node);
        staking.serve(llama, 0, 1, 0, new bytes(257), node);
    }

    function test_a_node_changes_its_model() public {
        serving(node, llama, BIG);
        vm.warp(START + epoch);
        vm.prank(node);
        staking.serve(bert, 0, 4, 0, "", node);
        assertEq(staking.weights(llama), 0);
        assertEq(staking.weights(bert), BIG);
        // Units count whatever the model.
        assertEq(staking.unitsAt(node, block.timestamp), 20);
        assertEq(staking.totalUnitsAt(block.timestamp), 20);
    }

    // Leaving

    function test_leaving_stake_is_no_security() public {
        serving(node, llama, BIG);
        vm.expectEmit(address(staking));
        emit IStaking.Unbonding(node, 1 ether, 1 ether, START + unbonding);
        vm.prank(node);
        staking.unbond(1 ether);
        assertEq(staking.nodes(node).stake, BIG);
        assertEq(staking.active(node), BIG - 1 ether);
        assertEq(staking.weights(llama), BIG - 1 ether);
    }

    function test_what_stays_is_nothing_or_the_minimum() public {
        serving(node, llama, BIG);
        revertsWith(IStaking.TooMuch.selector, BIG + 1, BIG);
        vm.prank(node);
        staking.unbond(BIG + 1);
        revertsWith(IStaking.TooLittle.selector, minStake - 1, minStake);
        vm.prank(node);
        staking.unbond(BIG - minStake + 1);
        vm.prank(node);
        staking.unbond(BIG - minStake);
        vm.prank(node);
        staking.unbond(minStake);
        assertEq(staking.active(node), 0);
    }

    function test_unbonding_ends_to_the_second() public {
        serving(node, llama, BIG);
        vm.prank(node);
        staking.unbond(BIG);
        vm.warp(START + unbonding - 1);
        revertsWith(IStaking.NotReady.selector, START + unbonding - 1, START + unbonding);
        vm.prank(node);
        staking.withdraw();
        vm.warp(START + unbonding);
        vm.expectEmit(address(staking));
        emit IStaking.Withdrawn(node, BIG);
        vm.prank(node);
        staking.withdraw();
        assertEq(token.balanceOf(node), BIG);
        vm.prank(node);
        staking.withdraw();
        assertEq(token.balanceOf(node), BIG);
    }

    function test_every_unbonding_restarts_the_delay() public {
        serving(node, llama, BIG);
        vm.prank(node);
        staking.unbond(1 ether);
        vm.warp(START + unbonding - 1);
        vm.prank(node);
        staking.unbond(1 ether);
        vm.warp(START + unbonding);
        revertsWith(IStaking.NotReady.selector, START + unbonding, START + 2 * unbonding - 1);
        vm.prank(node);
        staking.withdraw();
    }

    /// The mutant "UNBONDING 11 d" survives fuzzing: this is its test. A fault right before the unbonding must still be
    /// punishable at the last second of a trial that began at the last second of the evidence period.
    function test_a_fault_finds_its_stake_until_the_last_ruling() public {
        serving(node, llama, BIG);
        vm.prank(node);
        staking.unbond(BIG);
        vm.warp(START + parameter("EVIDENCE") + parameter("TRIAL"));
        vm.prank(node);
        try staking.withdraw() {
            revert("gone before the ruling");
        } catch {}
        assertEq(staking.slash(node, BIG, 0, address(0)), BIG);
    }

    /// The mutant "no hold check" survives fuzzing: this is its test.
    function test_nothing_is_withdrawn_while_a_case_is_open() public {
        serving(node, llama, BIG);
        vm.prank(node);
        staking.unbond(BIG);
        vm.expectEmit(address(staking));
        emit IStaking.HoldSet(node, 1);
        staking.hold(node, true);
        staking.hold(node, true);
        vm.warp(START + unbonding);
        for (uint256 open = 2; open > 0; open--) {
            vm.expectRevert(abi.encodeWithSelector(IStaking.Held.selector, open));
            vm.prank(node);
            staking.withdraw();
            staking.hold(node, false);
        }
        vm.prank(node);
        staking.withdraw();
        assertEq(token.balanceOf(node), BIG);
        vm.expectRevert(abi.encodeWithSelector(IStaking.NotHeld.selector, node));
        staking.hold(node, false);
    }

    // Slashing

    function test_only_the_slasher_holds_and_slashes() public {
        vm.expectRevert(abi.encodeWithSelector(IStaking.NotSlasher.selector, stranger, address(this)));
        vm.prank(stranger);
        staking.slash(node, 1, 0, stranger);
        vm.expectRevert(abi.encodeWithSelector(IStaking.NotSlasher.selector, stranger, address(this)));
        vm.prank(stranger);
        staking.hold(node, true);
    }

    function test_at_least_half_of_a_slash_burns() public {
        serving(node, llama, BIG);
        uint256 supply = token.totalSupply();
        vm.expectEmit(address(staking));
        emit IStaking.Slashed(node, 101, 50, client);
        assertEq(staking.slash(node, 101, 80, client), 101);
        assertEq(token.balanceOf(client), 50);
        assertEq(token.totalSupply(), supply - 51);
        assertEq(staking.active(node), BIG - 101);
        staking.slash(node, 100, 10, client);
        assertEq(token.balanceOf(client), 60);
    }

    function test_a_slash_reaches_leaving_stake() public {
        serving(node, llama, BIG);
        vm.prank(node);
        staking.unbond(BIG - minStake);
        assertEq(staking.slash(node, minStake + 1 ether, 0, client), minStake + 1 ether);
        Node memory n = staking.nodes(node);
        assertEq(n.stake, BIG - minStake - 1 ether);
        assertEq(n.leaving, n.stake);
        assertEq(staking.weights(llama), 0);
        assertEq(staking.slash(node, BIG, BIG, client), BIG - minStake - 1 ether); // no more than there is
        assertEq(staking.slash(node, 1, 1, client), 0);
    }

    // Units at a boundary

    function units(address who, uint256 time, uint256 expected) private view {
        assertEq(staking.unitsAt(who, time), expected);
    }

    function test_stake_of_this_epoch_counts_from_the_next() public {
        serving(node, llama, BIG);
        units(node, block.timestamp, 0);
        assertEq(staking.totalUnitsAt(block.timestamp), 0);
        uint256 boundary = (START / epoch + 1) * epoch;
        vm.warp(boundary - 1);
        units(node, block.timestamp, 0);
        vm.warp(boundary);
        units(node, block.timestamp, 20);
        assertEq(staking.totalUnitsAt(block.timestamp), 20);
    }

    function test_stake_counts_in_whole_units_while_it_serves() public {
        assertEq(staking.UNIT(), unitSize);
        staking.stake(node, BIG);
        vm.warp(START + epoch);
        units(node, block.timestamp, 0);
        serving(client, llama, 2 * minStake - 1);
        vm.warp(START + 2 * epoch);
        units(client, block.timestamp, 3);
        staking.stake(client, 1);
        vm.warp(START + 3 * epoch);
        units(client, block.timestamp, 4);
    }

    function test_stake_that_left_since_counts() public {
        serving(node, llama, BIG);
        vm.warp(START + epoch);
        vm.prank(node);
        staking.unbond(BIG - minStake);
        units(node, block.timestamp, 20);
        assertEq(staking.totalUnitsAt(block.timestamp), 20);
        vm.warp(START + 2 * epoch);
        units(node, block.timestamp, 2);
        units(node, START + epoch, 20);
    }

    /// Each epoch somebody stakes for the node; a trial that began before still knows its units.
    function test_a_stranger_makes_no_jurors_units_unknown() public {
        serving(node, llama, BIG);
        uint256 opened = START + epoch;
        for (uint256 day = 1; day <= 7; day++) {
            vm.warp(START + day * epoch);
            units(node, opened, 20);
            assertEq(staking.totalUnitsAt(opened), 20);
            units(node, block.timestamp, 19 + day);
            staking.stake(node, unitSize);
        }
        units(node, opened, 20);
        units(node, START + 3 * epoch, 22);
        units(node, START + 7 * epoch, 26);
        uint256 first = opened / epoch;
        vm.warp(START + 8 * epoch);
        units(node, opened, 20);
        staking.stake(node, unitSize);
        vm.expectRevert(abi.encodeWithSelector(IStaking.UnknownEpoch.selector, first, first + 7, first + 7));
        staking.unitsAt(node, opened);
        vm.expectRevert(abi.encodeWithSelector(IStaking.UnknownEpoch.selector, first, first + 7, first + 7));
        staking.totalUnitsAt(opened);
    }

    function test_dust_changes_no_units() public {
        serving(node, llama, BIG);
        vm.warp(START + epoch);
        uint256 since = staking.nodes(node).since;
        staking.stake(node, unitSize - 1);
        assertEq(staking.nodes(node).since, since);
        units(node, block.timestamp, 20);
    }

    function test_a_long_silence_is_remembered_at_once() public {
        serving(node, llama, BIG);
        vm.warp(START + 100 * epoch);
        units(node, START + epoch, 20);
        staking.stake(node, unitSize);
        units(node, block.timestamp, 20);
        units(node, START + 94 * epoch, 20);
        vm.warp(START + 101 * epoch);
        units(node, block.timestamp, 21);
    }

    /// Fewer, as many, and more epochs than boundaries, and than a word has bits for.
    function test_any_time_between_two_changes_is_remembered() public {
        serving(node, llama, BIG);
        (uint256 time, uint256 expected) = (START, 20);
        for (uint256 gap = 1; gap <= 16; gap++) {
            uint256 since = time;
            time += gap * epoch;
            vm.warp(time);
            staking.stake(node, unitSize);
            for (uint256 e = since + epoch > time - 6 * epoch ? since + epoch : time - 6 * epoch; e <= time; e += epoch) {
                units(node, e, expected);
                assertEq(staking.totalUnitsAt(e), expected);
            }
            expected++;
        }
    }

    function test_the_future_is_not_guessed() public {
        serving(node, llama, BIG);
        uint256 today = START / epoch;
        vm.expectRevert(abi.encodeWithSelector(IStaking.UnknownEpoch.selector, today + 1, today, today));
        staking.unitsAt(node, START + epoch);
        vm.expectRevert(abi.encodeWithSelector(IStaking.UnknownEpoch.selector, today + 1, today, today));
        staking.totalUnitsAt(START + epoch);
    }

    function test_units_fit_their_records() public {
        uint256 least = 2 * (token.CAP() / (1 << 21) + 1);
        deploy("Staking", abi.encode(token, models, this, least, unbonding, epoch, stale));
        bytes memory args = abi.encode(token, models, this, 2 * (token.CAP() >> 21), unbonding, epoch, stale);
        bytes memory reason = abi.encodeWithSelector(IStaking.TooManyUnits.selector, 1 << 21, (1 << 21) - 1);
        refusesToDeploy(initcode("Staking", args), reason);
    }

    function test_a_beat_is_due_before_a_node_is_stale() public {
        assertEq(staking.STALE(), stale);
        deploy("Staking", abi.encode(token, models, this, minStake, unbonding, epoch, epoch + 1));
        bytes memory code = initcode("Staking", abi.encode(token, models, this, minStake, unbonding, epoch, epoch));
        refusesToDeploy(code, abi.encodeWithSelector(IStaking.TooShortStale.selector, epoch, epoch));
    }

    // Signs of life

    function beat(address by) private {
        vm.prank(by);
        staking.beat();
    }

    function notReady(uint256 readyAt) private {
        revertsWith(IStaking.NotReady.selector, block.timestamp, readyAt);
    }

    function jailed() private {
        serving(node, llama, BIG);
        vm.warp(START + stale);
        staking.jail(node);
    }

    function test_serving_is_a_sign_of_life() public {
        serving(node, llama, BIG);
        assertEq(staking.nodes(node).seenAt, START);
        vm.warp(START + 5);
        vm.prank(node);
        staking.serve(llama, 0, 2, 0, "", node);
        assertEq(staking.nodes(node).seenAt, START + 5);
    }

    function test_a_hot_key_beats_once_an_epoch() public {
        serving(node, llama, BIG);
        vm.prank(node);
        staking.bind(session, START, proof(SESSION_KEY, node, START));
        vm.warp(START + epoch - 1);
        notReady(START + epoch);
        beat(session);
        vm.warp(START + epoch);
        beat(session);
        assertEq(staking.nodes(node).seenAt, START + epoch);
        notReady(START + 2 * epoch);
        beat(node);
        vm.warp(START + 2 * epoch);
        beat(node); // the owner's key will do
        assertEq(staking.nodes(node).seenAt, START + 2 * epoch);
        assertEq(staking.active(node), BIG);
    }

    function test_who_serves_nothing_does_not_beat() public {
        staking.stake(node, minStake);
        vm.warp(START + 2 * epoch);
        vm.expectRevert(abi.encodeWithSelector(IStaking.NotServing.selector, node));
        beat(node);
        vm.expectRevert(abi.encodeWithSelector(IStaking.NotServing.selector, stranger));
        beat(stranger);
        vm.expectRevert(abi.encodeWithSelector(IStaking.NotServing.selector, node));
        staking.jail(node);
    }

    function test_a_silent_node_goes_to_jail_to_the_second() public {
        serving(node, llama, BIG);
        serving(client, llama, minStake);
        vm.warp(START + epoch);
        beat(node);
        vm.warp(START + epoch + stale - 1);
        notReady(START + epoch + stale);
        staking.jail(node);
        vm.warp(START + epoch + stale);
        vm.expectEmit(address(staking));
        emit IStaking.Jailed(node, stranger, START + epoch);
        vm.prank(stranger); // anybody
        staking.jail(node);
        require(staking.nodes(node).jailed, "free");
        assertEq(staking.active(node), 0);
        assertEq(staking.weights(llama), minStake);
        assertEq(staking.stakeOf(node), BIG); // nothing is slashed
        vm.expectRevert(abi.encodeWithSelector(IStaking.InJail.selector, node));
        staking.jail(node);
    }

    /// As stake that left: a juror owes its seats in the cases of the epoch.
    function test_jail_takes_the_units_of_the_next_epoch() public {
        jailed();
        units(node, block.timestamp, 20);
        assertEq(staking.totalUnitsAt(block.timestamp), 20);
        vm.warp(START + stale + epoch);
        units(node, block.timestamp, 0);
        units(node, START + stale, 20);
        assertEq(staking.totalUnitsAt(block.timestamp), 0);
    }

    function test_a_beat_frees_from_jail_at_once() public {
        jailed();
        vm.warp(START + stale + epoch);
        require(staking.isJailed(node), "free");
        vm.expectEmit(address(staking));
        emit IStaking.Freed(node);
        beat(node);
        require(!staking.isJailed(node), "still in jail");
        require(!staking.nodes(node).jailed, "still in jail");
        assertEq(staking.active(node), BIG);
        assertEq(staking.weights(llama), BIG);
        units(node, block.timestamp, 0);
        notReady(START + 2 * stale + epoch);
        staking.jail(node);
        vm.warp(START + stale + 2 * epoch);
        units(node, block.timestamp, 20);
    }

    function test_serving_frees_from_jail() public {
        jailed();
        vm.expectEmit(address(staking));
        emit IStaking.Freed(node);
        vm.prank(node);
        staking.serve(llama, 0, 4, 0, "", node);
        assertEq(staking.active(node), BIG);
        assertEq(staking.weights(llama), BIG);
        vm.warp(START + 2 * stale);
        staking.jail(node);
        vm.prank(node);
        staking.serve(bert, 0, 4, 0, "", node);
        assertEq(staking.weights(llama), 0);
        assertEq(staking.weights(bert), BIG);
        assertEq(staking.nodes(node).seenAt, START + 2 * stale);
    }

    /// Whatever happens to its stake in jail, the sums stay right.
    function test_stake_moves_in_jail() public {
        jailed();
        staking.stake(node, minStake);
        staking.slash(node, 1 ether, 0, address(0));
        vm.prank(node);
        staking.unbond(minStake);
        assertEq(staking.active(node), 0);
        assertEq(staking.weights(llama), 0);
        beat(node);
        assertEq(staking.active(node), BIG - 1 ether);
        assertEq(staking.weights(llama), BIG - 1 ether);
    }

    function testFuzz_weights_add_up(uint96 a, uint96 b, uint96 out) public {
        uint256 first = within(a, minStake, BIG);
        uint256 second = within(b, minStake, BIG);
        serving(node, llama, first);
        serving(client, llama, second);
        uint256 part = within(out, 0, first - minStake);
        vm.prank(node);
        staking.unbond(part);
        assertEq(staking.weights(llama), first - part + second);
        assertEq(staking.active(node) + staking.active(client), staking.weights(llama));
    }

    function testFuzz_a_slash_is_bounded(uint128 asked, uint128 bounty, uint96 leaving) public {
        serving(node, llama, BIG);
        uint256 part = within(leaving, 0, BIG - minStake);
        vm.prank(node);
        staking.unbond(part);
        uint256 supply = token.totalSupply();
        uint256 taken = staking.slash(node, asked, bounty, client);
        assertEq(taken, asked < BIG ? asked : BIG);
        assertLe(token.balanceOf(client), bounty, "bounty");
        assertLe(token.balanceOf(client), taken / 2, "half");
        assertEq(supply - token.totalSupply() + token.balanceOf(client), taken);
        assertEq(staking.weights(llama), staking.active(node));
    }
}

/// Three nodes, two models, a slasher that holds, releases and slashes at any time between.
contract StakingHandler is World {
    struct Fault {
        address node;
        uint256 time;
        uint256 weight;
        uint256 slashed; // of this node, before the fault
    }

    Fault[] private faults;
    mapping(address node => uint256) private slashed;
    mapping(uint256 epoch => mapping(address node => uint256)) public boundary; // units at its beginning
    uint256 private firstEpoch;

    function setUp() public override {
        super.setUp();
        firstEpoch = START / epoch;
    }

    function book() external view returns (IStaking, IToken, bytes32[2] memory) {
        return (staking, token, [llama, bert]);
    }

    function nodeAt(uint256 i) public pure returns (address) {
        return vm.addr(300 + i % 3);
    }

    function stake(uint256 n, uint256 amount) external {
        uint256 active = staking.nodes(nodeAt(n)).stake - staking.nodes(nodeAt(n)).leaving;
        uint256 least = active < minStake ? minStake - active : 0;
        staking.stake(nodeAt(n), within(amount, least, 3 * minStake));
    }

    function serve(uint256 n, bool which) external {
        Node memory state = staking.nodes(nodeAt(n));
        if (state.stake - state.leaving < minStake) return;
        vm.prank(nodeAt(n));
        staking.serve(which ? llama : bert, 0, 4, 1, "", nodeAt(n));
    }

    function unbond(uint256 n, uint256 amount) external {
        Node memory state = staking.nodes(nodeAt(n));
        uint256 active = state.stake - state.leaving;
        bool all = active < 2 * minStake || amount % 2 == 0;
        vm.prank(nodeAt(n));
        staking.unbond(all ? active : within(amount, 0, active - minStake));
    }

    function withdraw(uint256 n) external {
        Node memory state = staking.nodes(nodeAt(n));
        uint256 purse = token.balanceOf(nodeAt(n));
        vm.prank(nodeAt(n));
        try staking.withdraw() {
            assertEq(state.holds, 0); // S6
            assertLe(state.leaveAt, block.timestamp, "too early");
            assertEq(token.balanceOf(nodeAt(n)) - purse, state.leaving);
        } catch {
            require(state.holds != 0 || block.timestamp < state.leaveAt, "refused without a reason");
        }
    }

    function hold(uint256 n, bool on) external {
        if (on || staking.nodes(nodeAt(n)).holds != 0) staking.hold(nodeAt(n), on);
    }

    function slash(uint256 n, uint256 amount, uint256 bounty) external {
        address accused = nodeAt(n);
        amount = within(amount, 0, 2 * minStake);
        uint256 bonded = staking.nodes(accused).stake;
        (uint256 purse, uint256 supply) = (token.balanceOf(client), token.totalSupply());
        uint256 taken = staking.slash(accused, amount, within(bounty, 0, 2 * minStake), client);
        assertEq(taken, amount < bonded ? amount : bonded); // S4
        assertLe(taken, 2 * (supply - token.totalSupply()), "S4: less than half burned");
        assertEq(token.balanceOf(client) - purse + supply - token.totalSupply(), taken);
        slashed[accused] += taken;
    }

    function fault(uint256 n) external {
        address accused = nodeAt(n);
        Node memory state = staking.nodes(accused);
        // Jail changes nothing about it.
        uint256 weight = state.model == 0 ? 0 : state.stake - state.leaving;
        faults.push(Fault(accused, block.timestamp, weight, slashed[accused]));
    }

    function beat(uint256 n) external {
        Node memory state = staking.nodes(nodeAt(n));
        vm.prank(nodeAt(n));
        try staking.beat() {
            require(state.jailed || block.timestamp >= state.seenAt + epoch, "too early");
            assertEq(staking.active(nodeAt(n)), state.stake - state.leaving); // S8
        } catch {
            require(state.model == 0 || block.timestamp < state.seenAt + epoch, "refused without a reason");
            require(!state.jailed, "kept in jail");
        }
    }

    function jail(uint256 n) external {
        Node memory state = staking.nodes(nodeAt(n));
        try staking.jail(nodeAt(n)) {
            assertLe(state.seenAt + stale, block.timestamp, "S8: within STALE");
            assertEq(staking.nodes(nodeAt(n)).stake, state.stake);
        } catch {
            require(state.model == 0 || state.jailed || block.timestamp < state.seenAt + stale, "refused without a reason");
        }
    }

    function pass(uint256 time) external {
        uint256 before = block.timestamp / epoch;
        vm.warp(block.timestamp + within(time, 1, 3 days));
        for (uint256 e = before + 1; e <= block.timestamp / epoch; e++) {
            for (uint256 i = 0; i < 3; i++) {
                Node memory n = staking.nodes(nodeAt(i));
                boundary[e][nodeAt(i)] = n.model == 0 || n.jailed ? 0 : (n.stake - n.leaving) / unitSize;
            }
        }
    }

    /// S7, for this epoch and the six before.
    function checkUnits() external view {
        uint256 newest = block.timestamp / epoch;
        for (uint256 e = newest - firstEpoch < 6 ? firstEpoch : newest - 6; e <= newest; e++) {
            uint256 sum;
            for (uint256 i = 0; i < 3; i++) {
                uint256 expected = boundary[e][nodeAt(i)];
                assertEq(staking.unitsAt(nodeAt(i), e * epoch), expected);
                sum += expected;
            }
            assertEq(staking.totalUnitsAt(e * epoch), sum);
        }
    }

    /// S5: a ruling within 12 days of a fault finds the stake that was active then, but for what was slashed since.
    function checkFaults() external view {
        for (uint256 i = 0; i < faults.length; i++) {
            Fault memory f = faults[i];
            if (block.timestamp > f.time + 12 days) continue;
            uint256 found = staking.nodes(f.node).stake + slashed[f.node] - f.slashed;
            assertLe(f.weight, found, "S5: stake is gone before the ruling");
        }
    }
}

contract StakingInvariants is Invariants {
    StakingHandler private handler;
    IStaking private staking;
    IToken private token;
    bytes32[2] private models;

    function setUp() public {
        handler = new StakingHandler();
        actedOnBy(handler);
        (staking, token, models) = handler.book();
    }

    function invariant_S1_S2_the_balance_is_all_stakes() public view {
        uint256 sum;
        for (uint256 i = 0; i < 3; i++) {
            Node memory n = staking.nodes(handler.nodeAt(i));
            assertLe(n.leaving, n.stake, "S2");
            sum += n.stake;
        }
        assertEq(token.balanceOf(address(staking)), sum);
    }

    function invariant_S3_S8_a_models_weight_is_its_nodes() public view {
        for (uint256 m = 0; m < 2; m++) {
            uint256 active;
            for (uint256 i = 0; i < 3; i++) {
                address node = handler.nodeAt(i);
                if (staking.nodes(node).model != models[m]) continue;
                active += staking.active(node);
                if (staking.nodes(node).jailed) assertEq(staking.active(node), 0); // S8
            }
            assertEq(staking.weights(models[m]), active);
        }
    }

    function invariant_S5_a_ruling_finds_the_stake() public view {
        handler.checkFaults();
    }

    function invariant_S7_units_are_those_of_the_boundaries() public view {
        handler.checkUnits();
    }
}
