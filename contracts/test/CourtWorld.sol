// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Timelock} from "../Timelock.sol";
import {IBeacon} from "../interfaces/IBeacon.sol";
import {Case, ICourt, Receipt, Terms, Verdict, Vote} from "../interfaces/ICourt.sol";
import {IEmissions} from "../interfaces/IEmissions.sol";
import {World, vm} from "./World.sol";

/// All contracts, wired as the deploy script wires them; an accused node with 20 units and five jurors with 120.
abstract contract CourtWorld is World {
    uint256 internal constant JUROR_KEY = 0x10000;
    uint256 internal constant JURORS = 5;
    uint256 internal constant JUROR_UNITS = 24;
    uint256 internal constant BLOCK = 20_000_000;
    bytes32 internal constant EVIDENCE_CID = "evidence";
    bytes32 internal constant ROOTS = "roots";

    IBeacon internal beacon;
    Timelock internal timelock;
    ICourt internal court;
    IEmissions internal emissions;
    Terms internal terms;

    address internal accuser = address(0xACC);
    address internal reporter = address(0x4E90);
    address internal proposer = address(0x9409);
    uint256 internal opened; // when the jurors' units count

    function setUp() public virtual override {
        vm.roll(BLOCK);
        super.setUp();
        terms = Terms({
            evidence: parameter("EVIDENCE"),
            commit: parameter("COMMIT"),
            reveal: parameter("REVEAL"),
            appeal: parameter("APPEAL"),
            relapse: parameter("RELAPSE"),
            lookahead: parameter("LOOKAHEAD"),
            headers: parameter("HEADERS"),
            minUnits: parameter("MIN_UNITS")
        });
        beacon = IBeacon(deploy("Beacon", ""));
        address next = vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 1);
        timelock = Timelock(payable(deploy("Timelock", abi.encode(next, parameter("NOTICE"), only(proposer)))));
        court = ICourt(deploy("Court", abi.encode(staking, beacon, timelock, terms)));
        emissions = IEmissions(
            deploy("Emissions", abi.encode(escrow, parameter("GAMMA_BPS"), parameter("BUDGET"), parameter("HALVING")))
        );
        require(token.MINTER() == address(emissions) && staking.SLASHER() == address(court), "another address");

        serving(node, llama, 10 * minStake);
        bytes memory signature = proof(SESSION_KEY, node, block.timestamp);
        vm.prank(node);
        staking.bind(session, block.timestamp, signature);
        for (uint256 i = 0; i < JURORS; i++) {
            // Seats come from all stake, whatever the model.
            serving(juror(i), i % 2 == 0 ? llama : bert, JUROR_UNITS * unitSize);
        }
        token.transfer(accuser, 1e6 ether);
        vm.prank(accuser);
        token.approve(address(court), type(uint256).max);
        opened = START + epoch;
        vm.warp(opened);
    }

    function only(address who) internal pure returns (address[] memory list) {
        list = new address[](1);
        list[0] = who;
    }

    /// Token, Models, Staking, Escrow, Beacon, Timelock, Court, Emissions: one after the other.
    function authorities() internal view virtual override returns (address minter, address slasher) {
        uint256 nonce = vm.getNonce(address(this));
        return (vm.computeCreateAddress(address(this), nonce + 7), vm.computeCreateAddress(address(this), nonce + 6));
    }

    function juror(uint256 i) internal pure returns (address) {
        return vm.addr(JUROR_KEY + i);
    }

    // Accusing

    function receiptOf(bytes32 sessionId, uint256 time) internal view returns (Receipt memory r) {
        r.node = node;
        r.model = llama;
        r.session = sessionId;
        (r.end, r.last, r.time) = (4, 32, uint48(time));
        (r.input, r.output) = ("input", "output");
    }

    function signed(Receipt memory r) internal view returns (bytes memory) {
        (uint8 v, bytes32 a, bytes32 b) = vm.sign(SESSION_KEY, court.digestOf(r));
        return abi.encodePacked(a, b, v);
    }

    function open(bytes32 sessionId, uint256 time, bytes32 evidence) internal returns (bytes32 id) {
        Receipt memory r = receiptOf(sessionId, time);
        bytes memory signature = signed(r);
        vm.prank(accuser);
        return court.open(r, signature, evidence);
    }

    /// The case that most tests are about: a receipt of now.
    function open() internal returns (bytes32) {
        return open("session", block.timestamp, EVIDENCE_CID);
    }

    function digestOf(bytes32 sessionId, uint256 time) internal view returns (bytes32) {
        return court.digestOf(receiptOf(sessionId, time));
    }

    // Drawing

    /// A header as long as real ones.
    function headerOf(uint256 number, uint256 randao) internal pure returns (bytes memory) {
        bytes memory word = bytes.concat(hex"a0", keccak256("word"));
        bytes memory bloom = bytes.concat(word, word, word, word, word, word, word, word);
        bytes memory start = bytes.concat(word, word, hex"94", bytes20(keccak256("coinbase")), word, word, word);
        bytes memory middle = bytes.concat(hex"b90108", bloom, hex"80", hex"84", bytes4(uint32(number)), hex"84ffffffff");
        bytes memory end = bytes.concat(hex"84ffffffff", hex"8465000000", word, hex"a0", bytes32(randao));
        bytes memory tail = bytes.concat(hex"880000000000000000", hex"8405f5e100", word, hex"80", hex"80", word, word);
        bytes memory payload = bytes.concat(start, middle, end, tail);
        return bytes.concat(hex"f9", bytes2(uint16(payload.length)), payload);
    }

    /// Mines the seed block with this randao; its header.
    function mine(bytes32 id, uint256 randao) internal returns (bytes memory header) {
        uint256 number = court.cases(id).seedBlock;
        header = headerOf(number, randao);
        vm.roll(number + 1);
        vm.setBlockhash(number, keccak256(header));
    }

    /// Draws with a randao that gives each juror `least` seats and together no more than `most`.
    function draw(bytes32 id, uint256 least, uint256 most) internal {
        uint256 round = court.cases(id).round;
        uint256 randao = 1;
        while (!seated(keccak256(abi.encode(randao, id, round)), round, least, most)) randao++;
        court.draw(id, mine(id, randao));
    }

    function draw(bytes32 id) internal {
        draw(id, court.cases(id).round == 0 ? 2 : 4, 1000);
    }

    function seated(bytes32 seed, uint256 round, uint256 least, uint256 most) private view returns (bool) {
        uint256 all;
        for (uint256 i = 0; i < JURORS; i++) {
            uint256 count = winning(seed, round, juror(i)).length;
            if (count < least) return false;
            all += count;
        }
        return all <= most;
    }

    /// The winning units, as a juror's software finds them.
    function winning(bytes32 seed, uint256 round, address who) internal view returns (uint256[] memory list) {
        uint256 units = staking.totalUnitsAt(opened) - staking.unitsAt(node, opened);
        uint256 seats = court.seatsOf(round);
        uint256 threshold = seats < units ? type(uint256).max / units * seats : type(uint256).max;
        uint256 own = staking.unitsAt(who, opened);
        list = new uint256[](own);
        uint256 count;
        for (uint256 unit = 0; unit < own; unit++) {
            if (uint256(keccak256(abi.encode(seed, who, unit))) < threshold) list[count++] = unit;
        }
        return firstOf(list, count);
    }

    function seatsOf(bytes32 id, address who) internal view returns (uint256[] memory) {
        uint256 round = court.cases(id).round;
        return winning(court.seeds(id, round), round, who);
    }

    function firstOf(uint256[] memory list, uint256 count) internal pure returns (uint256[] memory some) {
        some = new uint256[](count);
        for (uint256 i = 0; i < count; i++) {
            some[i] = list[i];
        }
    }

    // Voting

    function commitmentOf(bytes32 id, address who, Vote choice) internal view returns (bytes32) {
        return keccak256(abi.encode(id, court.cases(id).round, who, choice, ROOTS, bytes32("salt")));
    }

    function commit(bytes32 id, uint256 i, Vote choice, uint256 count) internal {
        uint256[] memory seats = firstOf(seatsOf(id, juror(i)), count);
        bytes32 commitment = commitmentOf(id, juror(i), choice);
        vm.prank(juror(i));
        court.commit(id, seats, commitment);
    }

    function reveal(bytes32 id, uint256 i, Vote choice) internal {
        court.reveal(id, juror(i), choice, ROOTS, "salt");
    }

    /// Each juror commits and reveals `counts[i]` seats for `votes[i]`; then the reveals' time is over.
    function vote(bytes32 id, Vote[5] memory votes, uint8[5] memory counts) internal {
        for (uint256 i = 0; i < JURORS; i++) {
            if (counts[i] != 0) commit(id, i, votes[i], counts[i]);
        }
        vm.warp(court.cases(id).commitEnd);
        for (uint256 i = 0; i < JURORS; i++) {
            if (counts[i] != 0) reveal(id, i, votes[i]);
        }
        vm.warp(court.cases(id).commitEnd + terms.reveal);
    }

    /// Two seats of each juror for the same vote.
    function vote(bytes32 id, Vote same) internal {
        vote(id, [same, same, same, same, same], [2, 2, 2, 2, 2]);
    }

    function rule(bytes32 sessionId, uint256 time, bytes32 evidence) internal returns (Verdict) {
        bytes32 receipt = digestOf(sessionId, time);
        Case memory c = court.cases(court.caseId(receipt, evidence));
        uint256 end = c.commitEnd + terms.reveal + (c.round == 2 ? 0 : terms.appeal);
        if (block.timestamp < end) vm.warp(end);
        return ruleAndEnforce(receipt, evidence);
    }

    function ruleAndEnforce(bytes32 receipt, bytes32 evidence) internal returns (Verdict verdict) {
        verdict = court.rule(receipt, evidence);
        court.enforce(court.caseId(receipt, evidence));
    }

    /// A whole case in one round, over a receipt of now: opened, drawn, voted, ruled, enforced.
    function tryFor(bytes32 sessionId, Vote same) internal returns (Verdict) {
        uint256 time = block.timestamp;
        opened = time;
        bytes32 id = open(sessionId, time, EVIDENCE_CID);
        draw(id);
        vote(id, same);
        return rule(sessionId, time, EVIDENCE_CID);
    }
}
