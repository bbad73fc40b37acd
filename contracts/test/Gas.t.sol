// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Receipt, Vote} from "../interfaces/ICourt.sol";
import {Deposit, Row} from "../interfaces/IEscrow.sol";
import {CourtWorld} from "./CourtWorld.sol";
import {World, vm} from "./World.sol";

/// What every operation costs as a transaction of its own, calldata and the 21,000 included, against its target.
/// `--snapshot` writes the numbers to snapshots/, `--snapshot-check` compares.
abstract contract GasRecorder is World {
    function record(string memory name, uint256 target) internal {
        assertLe(vm.snapshotGasLastCall("operations", name), target, name);
    }
}

/// hardhat-config: isolate = true
contract GasTest is GasRecorder {
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
        // The network has other nodes already.
        serving(session, bert, 2 * minStake);
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
        // Whole units, on another day: all sums change.
        vm.warp(START + epoch);
        vm.prank(stranger);
        staking.stake(node, minStake);
        record("stake units", 65_000);
        vm.warp(START + 2 * epoch);
        vm.prank(node);
        staking.unbond(minStake);
        record("unbond", 50_000);
        vm.warp(START + 2 * epoch + unbonding);
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
        vm.prank(session);
        staking.beat();
        record("beat", 32_000);
        vm.warp(block.timestamp + stale);
        vm.prank(stranger);
        staking.jail(node);
        record("jail", 45_000);
        vm.prank(session);
        staking.beat();
        record("beat from jail", 70_000);
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
        redeem(1, 1 ether, "redeem 1 first", 110_000);
        redeem(1, 2 ether, "redeem 1 steady", 77_000);
    }

    function test_redeem_10() public {
        fundClients(10);
        redeem(1, 1 ether, "redeem 1 first", 110_000);
        redeem(10, 2 ether, "redeem 10", 200_000);
    }

    function test_redeem_48() public {
        fundClients(48);
        redeem(1, 1 ether, "redeem 1 first", 110_000);
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

/// The Court's operations, and a claim. Jurors, accuser and Court have tokens already.
/// hardhat-config: isolate = true
contract CourtGasTest is GasRecorder, CourtWorld {
    function setUp() public override(World, CourtWorld) {
        CourtWorld.setUp();
        token.transfer(address(court), 1);
        token.transfer(reporter, 1);
        token.transfer(node, 1);
        for (uint256 i = 0; i < JURORS; i++) {
            token.transfer(juror(i), 1);
        }
    }

    function authorities() internal view override(World, CourtWorld) returns (address, address) {
        return CourtWorld.authorities();
    }

    function committed(bytes32 id, uint256 i, Vote choice, uint256 count) private {
        uint256[] memory seats = firstOf(seatsOf(id, juror(i)), count);
        bytes32 commitment = commitmentOf(id, juror(i), choice);
        vm.prank(juror(i));
        court.commit(id, seats, commitment);
    }

    /// One round for `choice`; every operation recorded under its name and `suffix`.
    function round(bytes32 sessionId, Vote choice, string memory suffix) private returns (bytes32 id) {
        uint256 time = block.timestamp;
        opened = time;
        Receipt memory r = receiptOf(sessionId, time);
        bytes memory signature = signed(r);
        bytes32 digest = court.digestOf(r);
        vm.prank(accuser);
        id = court.open(r, signature, EVIDENCE_CID);
        record("court.open", 185_000);
        uint256 randao = 1;
        while (!enough(keccak256(abi.encode(randao, id, uint256(0))))) randao++;
        bytes memory header = mine(id, randao);
        court.draw(id, header);
        record("court.draw", 160_000);
        for (uint256 i = 0; i < JURORS; i++) {
            committed(id, i, choice, i == 0 ? 1 : i == 1 ? 3 : 2);
            record(i == 0 ? "court.commit 1 seat" : i == 1 ? "court.commit 3 seats" : "court.commit 2 seats", 85_000);
        }
        vm.warp(court.cases(id).commitEnd);
        for (uint256 i = 0; i < JURORS; i++) {
            court.reveal(id, juror(i), choice, ROOTS, "salt");
            if (i != 0) record("court.reveal", 40_000);
        }
        vm.warp(court.cases(id).commitEnd + terms.reveal + terms.appeal);
        court.rule(digest, EVIDENCE_CID);
        record(string.concat("court.rule ", suffix), 110_000);
        court.enforce(id);
        record(string.concat("court.enforce ", suffix), 110_000);
    }

    function enough(bytes32 seed) private view returns (bool) {
        for (uint256 i = 0; i < JURORS; i++) {
            if (winning(seed, 0, juror(i)).length < 3) return false;
        }
        return true;
    }

    function test_clear() public {
        bytes32 id = round("session", Vote.Clear, "clear");
        court.settle(id, 0, juror(0));
        record("court.settle paid", 75_000);
    }

    function test_guilty() public {
        bytes32 id = round("session 1", Vote.Guilty, "guilty first");
        uint256[] memory seats = winning(court.seeds(id, 0), 0, juror(0));
        vm.prank(reporter);
        court.report(id, 0, juror(0), seats);
        record("court.report", 120_000);
        vm.warp(block.timestamp + 1);
        round("session 2", Vote.Guilty, "guilty again");
    }

    function test_appeal() public {
        bytes32 id = open();
        draw(id);
        vote(id, Vote.Guilty);
        vm.prank(accuser);
        court.appeal(id);
        record("court.appeal", 115_000);
    }

    function test_claim() public {
        fund(client, node, 1000 ether);
        fund(client, juror(0), 1000 ether);
        Row[] memory list = new Row[](1);
        list[0] = row(CLIENT_KEY, client, node, 1000 ether);
        escrow.redeem(node, list);
        list[0] = row(CLIENT_KEY, client, juror(0), 1000 ether);
        escrow.redeem(juror(0), list);
        vm.warp(block.timestamp + epoch);
        emissions.claim(block.timestamp / epoch - 1, node);
        emissions.claim(block.timestamp / epoch - 1, juror(0));
        record("emissions.claim", 125_000);
    }
}
