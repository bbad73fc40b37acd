// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {TimelockController} from "@openzeppelin/contracts/governance/TimelockController.sol";
import {Timelock} from "../Timelock.sol";
import {IBeacon} from "../interfaces/IBeacon.sol";
import {Case, ICourt, Verdict, Vote} from "../interfaces/ICourt.sol";
import {CourtWorld} from "./CourtWorld.sol";
import {vm} from "./World.sol";

/// Answers what it was told, for any block.
contract OtherBeacon {
    bytes32 private immutable ANSWER;

    constructor(bytes32 answer) {
        ANSWER = answer;
    }

    function randao(uint256, bytes calldata) external view returns (bytes32) {
        return ANSWER;
    }
}

contract GovernanceTest is CourtWorld {
    uint256 private notice;

    function setUp() public override {
        super.setUp();
        notice = parameter("NOTICE");
    }

    function announce(address target, bytes memory data) private {
        vm.prank(proposer);
        timelock.schedule(target, 0, data, 0, 0, notice);
    }

    function carryOut(address target, bytes memory data) private {
        vm.prank(stranger); // anybody
        timelock.execute(target, 0, data, 0, 0);
    }

    function govern(address target, bytes memory data) private {
        announce(target, data);
        vm.warp(block.timestamp + notice);
        carryOut(target, data);
    }

    function set(uint256 bond, uint256 unit) private {
        vm.prank(address(timelock));
        court.setRates(bond, unit);
    }

    function replaceBeacon(bytes32 answer) private returns (IBeacon next) {
        next = IBeacon(address(new OtherBeacon(answer)));
        vm.prank(address(timelock));
        court.setBeacon(next);
    }

    // The timelock

    function test_the_notice_ends_to_the_second() public {
        assertEq(timelock.NOTICE(), notice);
        assertEq(timelock.getMinDelay(), notice);
        assertEq(timelock.COURT(), address(court));
        bytes memory data = abi.encodeCall(ICourt.setRates, (2500, 20_000));
        vm.prank(proposer);
        vm.expectRevert(
            abi.encodeWithSelector(TimelockController.TimelockInsufficientDelay.selector, notice - 1, notice)
        );
        timelock.schedule(address(court), 0, data, 0, 0, notice - 1);
        announce(address(court), data);
        vm.warp(block.timestamp + notice - 1);
        vm.prank(stranger);
        try timelock.execute(address(court), 0, data, 0, 0) {
            revert("too early");
        } catch {}
        vm.warp(block.timestamp + 1);
        vm.expectEmit(address(court));
        emit ICourt.RatesSet(2500, 20_000);
        carryOut(address(court), data);
        (uint256 bond, uint256 unit) = court.rates();
        assertEq(bond, 2500);
        assertEq(unit, 20_000);
    }

    function test_only_the_proposer_announces_and_takes_back() public {
        bytes memory data = abi.encodeCall(ICourt.setRates, (5000, 10_000));
        vm.prank(stranger);
        try timelock.schedule(address(court), 0, data, 0, 0, notice) {
            revert("announced");
        } catch {}
        announce(address(court), data);
        bytes32 id = timelock.hashOperation(address(court), 0, data, 0, 0);
        vm.prank(stranger);
        try timelock.cancel(id) {
            revert("cancelled");
        } catch {}
        vm.prank(proposer);
        timelock.cancel(id);
        require(!timelock.isOperation(id), "still there");
    }

    function test_nobody_administers_it_but_itself() public {
        bytes32 admin = timelock.DEFAULT_ADMIN_ROLE();
        require(timelock.hasRole(admin, address(timelock)), "not itself");
        require(!timelock.hasRole(admin, address(this)) && !timelock.hasRole(admin, proposer), "an admin");
        bytes32 role = timelock.PROPOSER_ROLE();
        govern(address(timelock), abi.encodeCall(timelock.grantRole, (role, stranger)));
        require(timelock.hasRole(role, stranger), "not granted");
    }

    function test_the_notice_is_never_shortened() public {
        bytes memory data = abi.encodeCall(TimelockController.updateDelay, (notice - 1));
        announce(address(timelock), data);
        vm.warp(block.timestamp + notice);
        vm.expectRevert(abi.encodeWithSelector(Timelock.TooShort.selector, notice - 1, notice));
        timelock.execute(address(timelock), 0, data, 0, 0);
        govern(address(timelock), abi.encodeCall(TimelockController.updateDelay, (notice + 1)));
        assertEq(timelock.getMinDelay(), notice + 1);
        vm.expectRevert(
            abi.encodeWithSelector(TimelockController.TimelockUnauthorizedCaller.selector, address(this))
        );
        timelock.updateDelay(notice + 1);
        vm.prank(address(timelock));
        timelock.updateDelay(notice);
        assertEq(timelock.getMinDelay(), notice);
    }

    function test_it_calls_nobody_but_the_court() public {
        token.transfer(address(timelock), 1 ether);
        bytes memory data = abi.encodeWithSignature("transfer(address,uint256)", stranger, 1 ether);
        announce(address(token), data);
        vm.warp(block.timestamp + notice);
        vm.expectRevert(abi.encodeWithSelector(Timelock.OnlyTheCourt.selector, address(token), address(court)));
        timelock.execute(address(token), 0, data, 0, 0);
        address[] memory targets = only(address(token));
        bytes[] memory payloads = new bytes[](1);
        payloads[0] = data;
        vm.prank(proposer);
        timelock.scheduleBatch(targets, new uint256[](1), payloads, 0, 0, notice);
        vm.warp(block.timestamp + notice);
        vm.expectRevert(abi.encodeWithSelector(Timelock.OnlyTheCourt.selector, address(token), address(court)));
        timelock.executeBatch(targets, new uint256[](1), payloads, 0, 0);
    }

    function test_it_takes_no_coins() public {
        (bool taken, bytes memory reason) = address(timelock).call{value: 1}("");
        require(!taken && bytes4(reason) == Timelock.NoCoins.selector, "taken");
    }

    // What it may set

    function test_only_the_governor_sets() public {
        address[3] memory others = [stranger, proposer, address(this)];
        for (uint256 i = 0; i < 3; i++) {
            bytes memory reason = abi.encodeWithSelector(ICourt.NotGovernor.selector, others[i], address(timelock));
            vm.expectRevert(reason);
            vm.prank(others[i]);
            court.setRates(5000, 10_000);
            vm.expectRevert(reason);
            vm.prank(others[i]);
            court.setBeacon(beacon);
        }
    }

    function outOfBounds(uint256 bond, uint256 unit, uint256 rate, uint256 least, uint256 most) private {
        vm.expectRevert(abi.encodeWithSelector(ICourt.OutOfBounds.selector, rate, least, most));
        set(bond, unit);
    }

    function test_bond_and_unit_have_bounds() public {
        (uint256 bond, uint256 unit) = court.rates();
        assertEq(bond, 5000);
        assertEq(unit, 10_000);
        set(1250, 2500);
        set(5000, 40_000);
        outOfBounds(1249, 10_000, 1249, 1250, 5000);
        outOfBounds(5001, 10_000, 5001, 1250, 5000);
        outOfBounds(5000, 2499, 2499, 2500, 40_000);
        outOfBounds(5000, 40_001, 40_001, 2500, 40_000);
        // No truncation lets one through.
        outOfBounds((1 << 16) + 5000, 10_000, (1 << 16) + 5000, 1250, 5000);
        outOfBounds(5000, (1 << 16) + 10_000, (1 << 16) + 10_000, 2500, 40_000);
    }

    function testFuzz_rates_stay_within_their_bounds(uint256 bond, uint256 unit, bool near) public {
        if (near) (bond, unit) = (within(bond, 1200, 5050), within(unit, 2450, 40_050));
        bool allowed = 1250 <= bond && bond <= 5000 && 2500 <= unit && unit <= 40_000;
        vm.prank(address(timelock));
        try court.setRates(bond, unit) {
            require(allowed, "out of bounds");
            (uint256 foundBond, uint256 foundUnit) = court.rates();
            assertEq(foundBond, bond);
            assertEq(foundUnit, unit);
        } catch {
            require(!allowed, "refused without a reason");
        }
    }

    function testFuzz_it_calls_nobody_else(address target, bytes calldata data) public {
        if (target == address(court) || target == address(timelock)) return;
        announce(target, data);
        vm.warp(block.timestamp + notice);
        vm.expectRevert(abi.encodeWithSelector(Timelock.OnlyTheCourt.selector, target, address(court)));
        timelock.execute(target, 0, data, 0, 0);
    }

    function test_the_bond_of_the_next_case_changes() public {
        assertEq(court.bondFor(node, opened), 50 ether);
        set(1250, 10_000);
        assertEq(court.bondFor(node, opened), 12.5 ether);
        bytes32 id = open();
        assertEq(court.cases(id).purse, 12.5 ether);
        assertEq(token.balanceOf(address(court)), 12.5 ether);
    }

    /// 60,000 tokens outside the accused's are the least, whatever is set.
    function test_the_unit_moves_neither_seats_nor_the_least_jury() public {
        set(5000, 40_000);
        bytes32 id = open("first", opened, EVIDENCE_CID);
        assertEq(court.cases(id).units, 120);
        set(5000, 2500);
        vm.prank(juror(0));
        staking.unbond(unitSize);
        vm.warp(opened + epoch);
        bytes memory signature = signed(receiptOf("second", opened));
        vm.expectRevert(abi.encodeWithSelector(ICourt.TooFewUnits.selector, 119, 120));
        vm.prank(accuser);
        court.open(receiptOf("second", opened), signature, EVIDENCE_CID);
    }

    // Cases that are open

    function fined(bytes32 id, uint256 i) private returns (uint256) {
        uint256 before = staking.stakeOf(juror(i));
        uint256 round = court.cases(id).round;
        uint256[] memory seats = firstOf(seatsOf(id, juror(i)), 1);
        court.report(id, round, juror(i), seats);
        return before - staking.stakeOf(juror(i));
    }

    function test_a_case_keeps_its_bond_and_its_fine() public {
        bytes32 first = open("first", opened, EVIDENCE_CID);
        set(2500, 5000);
        bytes32 second = open("second", opened, EVIDENCE_CID);
        assertEq(court.cases(first).purse, 50 ether);
        assertEq(court.cases(second).purse, 25 ether);
        assertEq(court.appealBond(first), 100 ether);
        draw(first);
        draw(second);
        set(5000, 40_000);
        vm.warp(court.cases(second).commitEnd + terms.reveal);
        assertEq(fined(first, 0), unitSize / 1000);
        assertEq(fined(second, 0), unitSize / 2000);
    }

    function test_the_opposite_of_the_verdict_is_fined_by_the_cases_unit() public {
        set(5000, 5000);
        bytes32 id = open();
        set(5000, 40_000);
        draw(id);
        vote(id, [Vote.Guilty, Vote.Guilty, Vote.Guilty, Vote.Guilty, Vote.Clear], [2, 2, 2, 2, 1]);
        rule("session", opened, EVIDENCE_CID);
        uint256 before = staking.stakeOf(juror(4));
        court.settle(id, 0, juror(4));
        assertEq(before - staking.stakeOf(juror(4)), unitSize / 2000);
    }

    function test_a_case_keeps_its_beacon() public {
        bytes32 first = open("first", opened, EVIDENCE_CID);
        vm.expectEmit(address(court));
        address next = vm.computeCreateAddress(address(this), vm.getNonce(address(this)));
        emit ICourt.BeaconSet(1, IBeacon(next));
        IBeacon other = replaceBeacon("other");
        assertEq(address(other), next);
        assertEq(address(court.beacon()), address(other));
        assertEq(address(court.beacons(0)), address(beacon));
        bytes32 second = open("second", opened, EVIDENCE_CID);
        assertEq(court.cases(first).beacon, 0);
        assertEq(court.cases(second).beacon, 1);
        court.draw(second, "");
        assertEq(court.seeds(second, 0), keccak256(abi.encode(bytes32("other"), second, uint256(0))));
        // The first asks for a header, in every round.
        draw(first, 0, 1000);
        vm.warp(court.cases(first).commitEnd + terms.reveal);
        court.redraw(first);
        draw(first, 0, 1000);
    }

    function test_a_beacon_is_a_contract() public {
        vm.expectRevert(abi.encodeWithSelector(ICourt.NoBeacon.selector, stranger));
        vm.prank(address(timelock));
        court.setBeacon(IBeacon(stranger));
    }

    function test_a_change_settles_no_running_case() public {
        bytes32 id = open();
        draw(id);
        set(1250, 40_000);
        replaceBeacon("other");
        vote(id, Vote.Guilty);
        Case memory before = court.cases(id);
        require(rule("session", opened, EVIDENCE_CID) == Verdict.Guilty, "another verdict");
        assertEq(before.purse, 50 ether);
        assertEq(before.unitBps, 10_000);
        assertEq(token.balanceOf(accuser), 1e6 ether + 25 ether); // bond and bounty
    }
}
