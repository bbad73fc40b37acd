// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IEmissions} from "../interfaces/IEmissions.sol";
import {IEscrow, Row} from "../interfaces/IEscrow.sol";
import {IStaking} from "../interfaces/IStaking.sol";
import {IToken} from "../interfaces/IToken.sol";
import {CourtWorld} from "./CourtWorld.sol";
import {Invariants, vm} from "./World.sol";

contract EmissionsTest is CourtWorld {
    uint256 private constant PAID = 1000 ether;

    /// `who` redeems `amount` of the client's; burns a twentieth of it.
    function work(address who, uint256 total) private {
        fund(client, who, total);
        Row[] memory list = new Row[](1);
        list[0] = row(CLIENT_KEY, client, who, total);
        escrow.redeem(who, list);
    }

    function today() private view returns (uint256) {
        return block.timestamp / epoch;
    }

    function test_the_terms_are_the_parameters() public view {
        assertEq(emissions.GAMMA_BPS(), parameter("GAMMA_BPS"));
        assertEq(emissions.BUDGET(), parameter("BUDGET"));
        assertEq(emissions.HALVING(), parameter("HALVING"));
        assertEq(emissions.START(), START / epoch);
        assertEq(address(emissions.ESCROW()), address(escrow));
        assertEq(address(emissions.STAKING()), address(staking));
        assertEq(address(emissions.TOKEN()), address(token));
    }

    function test_less_than_what_burned_comes_back() public {
        bytes memory code = initcode("Emissions", abi.encode(escrow, 10_000, 1, 1));
        refusesToDeploy(code, abi.encodeWithSelector(IEmissions.BadGamma.selector, 10_000, 10_000));
        deploy("Emissions", abi.encode(escrow, 9_999, 1, 1));
    }

    function test_the_budgets_fit_the_cap() public {
        uint256 room = token.CAP() - token.minted();
        bytes memory code = initcode("Emissions", abi.encode(escrow, 9000, room / 4 + 1, 2));
        refusesToDeploy(code, abi.encodeWithSelector(IEmissions.OverCap.selector, room + 4, room));
        deploy("Emissions", abi.encode(escrow, 9000, room / 4, 2));
    }

    function test_the_budget_halves() public view {
        (uint256 start, uint256 first, uint256 halving) = (emissions.START(), emissions.BUDGET(), emissions.HALVING());
        assertEq(emissions.budget(start - 1), 0);
        assertEq(emissions.budget(start), first);
        assertEq(emissions.budget(start + halving - 1), first);
        assertEq(emissions.budget(start + halving), first / 2);
        assertEq(emissions.budget(start + 10 * halving), first / 1024);
        assertEq(emissions.budget(start + 300 * halving), 0);
        assertLe(2 * halving * first, token.CAP() - parameter("GENESIS"), "the sum of all budgets");
    }

    function test_a_reward_is_minted_into_the_stake() public {
        work(node, PAID);
        uint256 epoch_ = today();
        vm.expectRevert(abi.encodeWithSelector(IEmissions.Early.selector, epoch_, epoch_));
        emissions.claim(epoch_, node);
        vm.warp((epoch_ + 1) * epoch - 1);
        vm.expectRevert(abi.encodeWithSelector(IEmissions.Early.selector, epoch_, epoch_));
        emissions.claim(epoch_, node);
        vm.warp((epoch_ + 1) * epoch);
        (uint256 minted, uint256 stake) = (token.minted(), staking.nodes(node).stake);
        vm.expectEmit(address(emissions));
        emit IEmissions.Rewarded(epoch_, node, 45 ether);
        vm.prank(stranger); // anybody
        assertEq(emissions.claim(epoch_, node), 45 ether);
        assertEq(staking.nodes(node).stake, stake + 45 ether);
        assertEq(token.minted(), minted + 45 ether);
        assertEq(token.balanceOf(address(emissions)), 0);
        require(emissions.claimed(epoch_, node), "not noted");
        vm.expectRevert(abi.encodeWithSelector(IEmissions.Claimed.selector, epoch_, node));
        emissions.claim(epoch_, node);
    }

    function test_who_burned_nothing_gets_nothing() public {
        work(node, PAID);
        uint256 epoch_ = today();
        vm.warp(block.timestamp + epoch);
        vm.expectRevert(abi.encodeWithSelector(IEmissions.NothingBurned.selector, epoch_, stranger));
        emissions.claim(epoch_, stranger);
    }

    function test_the_budget_bounds_what_all_get() public {
        // Fees of a million tokens: more than the budget.
        work(node, 15e6 ether);
        work(juror(0), 5e6 ether);
        uint256 epoch_ = today();
        vm.warp(block.timestamp + epoch);
        assertEq(emissions.claim(epoch_, node), emissions.BUDGET() * 3 / 4);
        assertEq(emissions.claim(epoch_, juror(0)), emissions.BUDGET() / 4);
    }

    function test_jail_is_out_of_rewards_until_the_beat() public {
        work(node, PAID);
        uint256 epoch_ = today();
        vm.warp(START + stale);
        staking.jail(node);
        vm.expectRevert(abi.encodeWithSelector(IEmissions.InJail.selector, node));
        emissions.claim(epoch_, node);
        vm.prank(node);
        staking.beat();
        assertEq(emissions.claim(epoch_, node), 45 ether);
    }

    /// Anybody may redeem for a node, be it nothing.
    function test_redeeming_is_no_sign_of_life() public {
        vm.warp(START + stale);
        work(node, PAID);
        escrow.redeem(node, new Row[](0));
        staking.jail(node);
        work(node, 2 * PAID);
        escrow.redeem(node, new Row[](0));
        uint256 epoch_ = today();
        vm.warp(block.timestamp + epoch);
        vm.expectRevert(abi.encodeWithSelector(IEmissions.InJail.selector, node));
        emissions.claim(epoch_, node);
    }

    function test_who_left_must_stake_again() public {
        work(node, PAID);
        uint256 epoch_ = today();
        vm.prank(node);
        staking.unbond(10 * minStake);
        vm.warp(block.timestamp + epoch);
        vm.expectRevert(abi.encodeWithSelector(IStaking.TooLittle.selector, 45 ether, minStake));
        emissions.claim(epoch_, node);
        staking.stake(node, minStake);
        emissions.claim(epoch_, node);
    }

    /// Who pays itself gets less back than it burned, whatever share of the network it is, monopolist included.
    function testFuzz_farming_never_pays(uint96 own, uint96 others, bool alone) public {
        uint256 paid = within(own, 1, 20e6 ether);
        uint256 epoch_ = today();
        if (!alone) work(juror(0), within(others, 1, 20e6 ether));
        uint256 before = token.balanceOf(address(this)) + token.balanceOf(node) + staking.nodes(node).stake;
        work(node, paid); // this contract is client and node
        vm.warp(block.timestamp + epoch);
        uint256 fee = escrow.burnedBy(epoch_, node);
        if (fee != 0) {
            uint256 reward = emissions.claim(epoch_, node);
            require(reward < fee, "farming pays");
            assertLe(10 * reward, 9 * fee, "gamma");
        }
        uint256 later = token.balanceOf(address(this)) + token.balanceOf(node) + staking.nodes(node).stake;
        assertLe(later, before, "farming pays");
        if (fee != 0) require(later < before, "farming is free");
    }
}

/// Two nodes work for two clients over some epochs; anybody claims, again and again.
contract EmissionsHandler is CourtWorld {
    uint256 public firstEpoch;
    mapping(uint256 epoch => uint256) public rewarded;
    mapping(uint256 epoch => mapping(address node => uint256)) public claims;
    mapping(address node => uint256) private owed;
    uint256 public rewards;

    function setUp() public override {
        super.setUp();
        firstEpoch = block.timestamp / epoch;
    }

    function book() external view returns (IEmissions, IEscrow, IToken) {
        return (emissions, escrow, token);
    }

    function work(uint256 who, uint256 amount) external {
        address worker = juror(who % 2);
        owed[worker] += within(amount, 1, 5e6 ether);
        fund(client, worker, owed[worker] - escrow.channels(client, worker).funded);
        Row[] memory list = new Row[](1);
        list[0] = row(CLIENT_KEY, client, worker, owed[worker]);
        escrow.redeem(worker, list);
    }

    function claim(uint256 who, uint256 ago) external {
        address worker = juror(who % 2);
        uint256 newest = block.timestamp / epoch;
        uint256 which = newest - within(ago, 0, newest - firstEpoch);
        uint256 minted = token.minted();
        bool jailed = staking.nodes(worker).jailed;
        try emissions.claim(which, worker) returns (uint256 amount) {
            assertEq(token.minted() - minted, amount);
            require(!jailed, "M3: paid in jail");
            (rewarded[which], rewards) = (rewarded[which] + amount, rewards + amount);
            assertEq(++claims[which][worker], 1);
        } catch {
            bool reason = which == newest || claims[which][worker] != 0 || escrow.burnedBy(which, worker) == 0;
            require(reason || jailed, "refused without a reason");
        }
    }

    function jail(uint256 who) external {
        try staking.jail(juror(who % 2)) {} catch {}
    }

    function beat(uint256 who) external {
        vm.prank(juror(who % 2));
        try staking.beat() {} catch {}
    }

    function pass(uint256 time) external {
        vm.warp(block.timestamp + within(time, 1, 2 days));
    }
}

contract EmissionsInvariants is Invariants {
    EmissionsHandler private handler;
    IEmissions private emissions;
    IEscrow private escrow;
    IToken private token;
    uint256 private genesis;

    function setUp() public {
        handler = new EmissionsHandler();
        actedOnBy(handler);
        (emissions, escrow, token) = handler.book();
        genesis = token.minted();
    }

    function invariant_M1_M2_rewards_stay_below_what_burned() public view {
        uint256 newest = block.timestamp / 1 days;
        for (uint256 e = handler.firstEpoch(); e <= newest; e++) {
            assertLe(handler.rewarded(e), escrow.burned(e) * 9 / 10, "gamma");
            assertLe(handler.rewarded(e), emissions.budget(e), "budget");
        }
    }

    function invariant_M4_the_supply_is_what_was_minted() public view {
        assertEq(token.minted(), genesis + handler.rewards());
        assertLe(token.minted(), token.CAP(), "cap");
        assertEq(token.balanceOf(address(emissions)), 0);
    }
}
