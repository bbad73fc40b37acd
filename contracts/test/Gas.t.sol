// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Deposit, Row} from "../interfaces/IEscrow.sol";
import {World, vm} from "./World.sol";

/// What every operation costs as a transaction of its own, calldata and the 21,000 included, against its target.
/// `--snapshot` writes the numbers to snapshots/, `--snapshot-check` compares.
/// hardhat-config: isolate = true
contract GasTest is World {
    address private payee = address(0xFEE);

    function setUp() public override {
        super.setUp();
        token.transfer(stranger, 1e6 ether);
        // Whoever gets tokens has some already.
        token.transfer(payee, 1);
        token.transfer(node, 1);
        token.transfer(client, 1);
        vm.prank(stranger);
        token.approve(address(staking), type(uint256).max);
        vm.prank(stranger);
        token.approve(address(escrow), type(uint256).max);
    }

    function record(string memory name, uint256 target) private {
        assertLe(vm.snapshotGasLastCall("operations", name), target, name);
    }

    function serve(bytes32 model, uint16 end) private {
        vm.prank(node);
        staking.serve(model, 0, end, 1 gwei, "https://node.example.org:8080/", client);
    }

    function deposits(uint256 count, address first) private pure returns (Deposit[] memory list) {
        list = new Deposit[](count);
        for (uint256 i = 0; i < count; i++) {
            list[i] = Deposit(i == 0 ? first : vm.addr(1000 + i), 100 ether);
        }
    }

    function test_transfer() public {
        vm.prank(stranger);
        token.transfer(payee, 1 ether);
        record("transfer", 35_000);
    }

    function test_models_add() public {
        vm.prank(stranger);
        models.add("some manifest", "some weights", 32);
        record("models.add", 95_000);
    }

    function test_staking() public {
        vm.prank(stranger);
        staking.stake(node, minStake);
        record("stake first", 115_000);
        serve(llama, 4);
        record("serve first", 110_000);
        serve(llama, 8);
        record("serve change", 45_000);
        vm.prank(stranger);
        staking.stake(node, 100 ether);
        record("stake top-up", 65_000);
        vm.warp(START + epoch);
        vm.prank(node);
        staking.unbond(100 ether);
        record("unbond", 50_000);
        vm.warp(START + epoch + unbonding);
        vm.prank(node);
        staking.withdraw();
        record("unstake withdraw", 55_000);
        bytes memory signature = proof(SESSION_KEY, node, block.timestamp);
        vm.prank(node);
        staking.bind(session, block.timestamp, signature);
        record("bind", 62_000);
        vm.prank(node);
        staking.setPayee(payee);
        record("setPayee", 47_000);
        staking.hold(node, true);
        record("hold", 32_000);
        staking.slash(node, 10 ether, 5 ether, client);
        record("slash", 95_000);
    }

    function test_fund() public {
        vm.prank(stranger);
        escrow.fund(client, deposits(1, node));
        vm.prank(stranger);
        escrow.fund(client, deposits(1, stranger));
        record("fund 1 new", 85_000);
        vm.prank(stranger);
        escrow.fund(client, deposits(1, node));
        record("fund top-up", 50_000);
        vm.prank(stranger);
        escrow.fund(session, deposits(16, node));
        record("fund 16 new", 450_000);
    }

    /// `count` clients, each with its own key and 100 tokens in the node's channel.
    function fundClients(uint256 count) private {
        for (uint256 i = 0; i < count; i++) {
            fund(vm.addr(2000 + i), node, 100 ether);
        }
    }

    function redeem(uint256 count, uint256 total, string memory name, uint256 target) private {
        Row[] memory list = new Row[](count);
        for (uint256 i = 0; i < count; i++) {
            list[i] = row(2000 + i, vm.addr(2000 + i), node, total);
        }
        escrow.redeem(node, list);
        record(name, target);
    }

    function test_redeem_first_and_steady() public {
        fundClients(1);
        redeem(1, 1 ether, "redeem 1 first", 110_500);
        redeem(1, 2 ether, "redeem 1 steady", 77_000);
    }

    function test_redeem_10() public {
        fundClients(10);
        redeem(1, 1 ether, "redeem 1 first", 110_500);
        redeem(10, 2 ether, "redeem 10", 200_000);
    }

    function test_redeem_48() public {
        fundClients(48);
        redeem(1, 1 ether, "redeem 1 first", 110_500);
        redeem(48, 2 ether, "redeem 48", 715_000);
    }

    function test_taking_back() public {
        fund(client, node, 100 ether);
        vm.prank(client);
        escrow.exit(node, 50 ether);
        record("exit", 50_000);
        vm.prank(client);
        escrow.setSigner(session, true);
        record("setSigner", 50_000);
        vm.warp(START + exitDelay);
        vm.prank(client);
        escrow.withdraw(node);
        record("exit withdraw", 50_000);
        vm.prank(node);
        escrow.refund(client, 10 ether);
        record("refund", 55_000);
    }
}
