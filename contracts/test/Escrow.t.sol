// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Channel, Deposit, IEscrow, Row} from "../interfaces/IEscrow.sol";
import {IToken} from "../interfaces/IToken.sol";
import {Invariants, World, vm} from "./World.sol";

/// A smart account that calls every signature valid and does what it is told.
contract Wallet {
    function isValidSignature(bytes32, bytes calldata) external pure returns (bytes4) {
        return 0x1626ba7e;
    }

    function act(address target, bytes calldata data) external {
        (bool done,) = target.call(data);
        require(done, "refused");
    }
}

contract EscrowTest is World {
    function redeem(uint256 key, uint256 total) private returns (uint256) {
        return escrow.redeem(node, rows(key, total))[0];
    }

    function assertChannel(uint256 funded, uint256 paid) private view {
        Channel memory channel = escrow.channels(client, node);
        assertEq(channel.funded, funded);
        assertEq(channel.paid, paid);
    }

    // Paying

    function test_anybody_funds_anybody_in_one_transfer() public {
        Deposit[] memory deposits = new Deposit[](3);
        deposits[0] = Deposit(node, 100);
        deposits[1] = Deposit(stranger, 20);
        deposits[2] = Deposit(node, 3);
        vm.expectEmit(address(escrow));
        emit IEscrow.Funded(client, node, 100, address(this));
        escrow.fund(client, deposits);
        assertChannel(103, 0);
        assertEq(escrow.available(client, stranger), 20);
        assertEq(token.balanceOf(address(escrow)), 123);
        escrow.fund(client, new Deposit[](0));
    }

    function test_the_fee_may_not_exceed_everything() public {
        bytes memory code = initcode("Escrow", abi.encode(staking, 10_001, exitDelay));
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadFee.selector, 10_001, 10_000));
        create(code);
    }

    function test_a_voucher_pays_the_payee_and_burns_the_fee() public {
        vm.prank(node);
        staking.setPayee(stranger);
        fund(client, node, 1000);
        uint256 supply = token.totalSupply();
        Row[] memory list = rows(CLIENT_KEY, 600);
        vm.expectEmit(address(escrow));
        emit IEscrow.Redeemed(client, node, 600);
        escrow.redeem(node, list);
        assertEq(token.balanceOf(stranger), 570);
        assertEq(token.totalSupply(), supply - 30);
        assertEq(escrow.burned(START / epoch), 30);
        assertEq(escrow.burnedBy(START / epoch, node), 30);
        assertChannel(1000, 600);
        vm.warp(START + epoch);
        redeem(CLIENT_KEY, 800);
        assertEq(escrow.burned(START / epoch + 1), 10);
        assertEq(escrow.burned(START / epoch), 30);
    }

    function test_a_replay_pays_nothing() public {
        fund(client, node, 1000);
        assertEq(redeem(CLIENT_KEY, 600), 600);
        assertEq(redeem(CLIENT_KEY, 600), 0);
        assertEq(redeem(CLIENT_KEY, 500), 0);
        assertEq(redeem(CLIENT_KEY, 601), 1);
    }

    function test_a_voucher_above_the_funds_is_paid_in_part_and_keeps_the_rest() public {
        fund(client, node, 100);
        assertEq(redeem(CLIENT_KEY, type(uint256).max), 100);
        fund(client, node, 1); // dust in front of a redemption loses nobody anything
        assertEq(redeem(CLIENT_KEY, 250), 1);
        fund(client, node, 500);
        assertEq(redeem(CLIENT_KEY, 250), 149);
    }

    function test_bad_rows_stop_nobody() public {
        fund(client, node, 1000);
        fund(stranger, node, 1000);
        Row[] memory list = new Row[](7);
        list[0] = row(STRANGER_KEY, client, node, 10); // not the client's key
        list[1] = row(CLIENT_KEY, client, stranger, 10); // for another node
        list[2] = row(STRANGER_KEY, stranger, node, 10);
        list[3] = Row(client, 10, 0, 0);
        list[4] = row(CLIENT_KEY, client, node, 10);
        list[5] = row(CLIENT_KEY, client, node, 10); // twice
        list[6] = row(SESSION_KEY, address(0), node, 10);
        uint256[] memory amounts = escrow.redeem(node, list);
        assertEq(amounts[0] + amounts[1] + amounts[3] + amounts[5] + amounts[6], 0);
        assertEq(amounts[2], 10);
        assertEq(amounts[4], 10);
        assertEq(escrow.redeem(node, new Row[](0)).length, 0);
    }

    function test_nobody_signs_for_the_zero_address() public {
        fund(address(0), node, 10);
        Row[] memory list = new Row[](1);
        list[0] = Row(address(0), 10, 0, 0);
        assertEq(escrow.redeem(node, list)[0], 0);
    }

    /// ERC-1271 is not asked: a contract's word could change until the redemption, and calling it would cost what it likes. It
    /// pays by a key that it has set.
    function test_a_contract_wallet_pays_by_a_key_that_it_has_set_and_by_nothing_else() public {
        Wallet wallet = new Wallet();
        token.transfer(address(wallet), 100);
        wallet.act(address(token), abi.encodeCall(token.approve, (address(escrow), 100)));
        Deposit[] memory deposits = new Deposit[](1);
        deposits[0] = Deposit(node, 100);
        wallet.act(address(escrow), abi.encodeCall(IEscrow.fund, (address(wallet), deposits)));
        Row[] memory list = new Row[](2);
        list[0] = row(CLIENT_KEY, address(wallet), node, 10); // its owner's, which it calls valid
        list[1] = row(SESSION_KEY, address(wallet), node, 10);
        require(wallet.isValidSignature(0, "") == 0x1626ba7e, "the wallet takes everything");
        uint256[] memory amounts = escrow.redeem(node, list);
        assertEq(amounts[0] + amounts[1], 0);
        wallet.act(address(escrow), abi.encodeCall(IEscrow.setSigner, (session, true)));
        amounts = escrow.redeem(node, list);
        assertEq(amounts[0], 0);
        assertEq(amounts[1], 10);
        // What is left is its own again, by its own calls.
        wallet.act(address(escrow), abi.encodeCall(IEscrow.exit, (node, 90)));
        vm.warp(START + exitDelay);
        escrow.withdrawFor(address(wallet), node);
        assertEq(token.balanceOf(address(wallet)), 90);
    }

    function test_a_high_s_is_refused() public {
        fund(client, node, 10);
        (, bytes32 r, bytes32 s) = vm.sign(CLIENT_KEY, voucherDigest(client, node, 10));
        uint256 mirrored = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141 - uint256(s);
        // The bit above s says v, so the mirrored s does not even fit with v = 27; both readings must fail.
        Row[] memory list = new Row[](2);
        list[0] = Row(client, 10, r, bytes32(mirrored));
        list[1] = Row(client, 10, r, bytes32(mirrored | 1 << 255));
        uint256[] memory amounts = escrow.redeem(node, list);
        assertEq(amounts[0] + amounts[1], 0);
    }

    function test_a_voucher_binds_chain_and_contract() public {
        fund(client, node, 10);
        Row[] memory list = rows(CLIENT_KEY, 10);
        uint256 home = block.chainid;
        vm.chainId(home + 1);
        assertEq(escrow.redeem(node, list)[0], 0);
        vm.chainId(home);
        IEscrow other = IEscrow(deploy("Escrow", abi.encode(staking, feeBps, exitDelay)));
        token.approve(address(other), 10);
        Deposit[] memory deposits = new Deposit[](1);
        deposits[0] = Deposit(node, 10);
        other.fund(client, deposits);
        assertEq(other.redeem(node, list)[0], 0);
        assertEq(escrow.redeem(node, list)[0], 10);
    }

    // Taking back

    function test_an_exit_is_ready_to_the_second() public {
        fund(client, node, 100);
        vm.expectEmit(address(escrow));
        emit IEscrow.Exiting(client, node, 70, START + exitDelay);
        vm.prank(client);
        escrow.exit(node, 70);
        assertEq(escrow.available(client, node), 30);
        vm.warp(START + exitDelay - 1);
        vm.expectRevert(
            abi.encodeWithSelector(IEscrow.NotReady.selector, START + exitDelay - 1, START + exitDelay)
        );
        vm.prank(client);
        escrow.withdraw(node);
        vm.warp(START + exitDelay);
        assertEq(escrow.available(client, node), 30);
        vm.expectEmit(address(escrow));
        emit IEscrow.Withdrawn(client, node, 70);
        vm.prank(client);
        escrow.withdraw(node);
        assertEq(token.balanceOf(client), 70);
        assertChannel(30, 0);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotExiting.selector, client, node));
        vm.prank(client);
        escrow.withdraw(node);
    }

    function test_vouchers_are_paid_before_an_exit() public {
        fund(client, node, 100);
        vm.prank(client);
        escrow.exit(node, 100);
        assertEq(redeem(CLIENT_KEY, 60), 60);
        assertEq(escrow.available(client, node), 0);
        vm.warp(START + exitDelay);
        vm.prank(client);
        escrow.withdraw(node);
        assertEq(token.balanceOf(client), 40);
        assertChannel(60, 60);
        // The rest of an old voucher stays a debt, paid from what comes next.
        fund(client, node, 50);
        assertEq(redeem(CLIENT_KEY, 80), 20);
    }

    function test_an_exit_that_was_all_spent_ends() public {
        fund(client, node, 100);
        vm.prank(client);
        escrow.exit(node, 100);
        redeem(CLIENT_KEY, 100);
        vm.warp(START + exitDelay);
        vm.prank(client);
        escrow.withdraw(node);
        assertEq(token.balanceOf(client), 0);
        assertEq(escrow.exits(client, node).amount, 0);
    }

    function test_an_exit_takes_no_more_than_is_left() public {
        fund(client, node, 100);
        redeem(CLIENT_KEY, 40);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooMuch.selector, 61, 60));
        vm.prank(client);
        escrow.exit(node, 61);
    }

    function test_a_second_exit_replaces_the_first_and_zero_calls_it_off() public {
        fund(client, node, 100);
        vm.prank(client);
        escrow.exit(node, 100);
        vm.warp(START + 10);
        vm.prank(client);
        escrow.exit(node, 20);
        assertEq(escrow.exits(client, node).amount, 20);
        assertEq(escrow.exits(client, node).readyAt, START + 10 + exitDelay);
        vm.prank(client);
        escrow.exit(node, 0);
        assertEq(escrow.available(client, node), 100);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotExiting.selector, client, node));
        vm.prank(client);
        escrow.withdraw(node);
    }

    function test_a_node_refunds_at_once() public {
        fund(client, node, 100);
        redeem(CLIENT_KEY, 40);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooMuch.selector, 61, 60));
        vm.prank(node);
        escrow.refund(client, 61);
        vm.expectEmit(address(escrow));
        emit IEscrow.Refunded(client, node, 60);
        vm.prank(node);
        escrow.refund(client, 60);
        assertEq(token.balanceOf(client), 60);
        assertChannel(40, 40);
    }

    function test_available_is_never_below_zero() public {
        fund(client, node, 100);
        vm.prank(client);
        escrow.exit(node, 80);
        vm.prank(node);
        escrow.refund(client, 50);
        assertEq(escrow.available(client, node), 0);
        vm.warp(START + exitDelay);
        vm.prank(client);
        escrow.withdraw(node);
        assertEq(token.balanceOf(client), 100);
    }

    // Signers

    function test_a_signer_signs_until_a_delay_after_its_end() public {
        fund(client, node, 1000);
        assertEq(redeem(SESSION_KEY, 10), 0);
        vm.expectEmit(address(escrow));
        emit IEscrow.SignerSet(client, session, type(uint256).max);
        vm.prank(client);
        escrow.setSigner(session, true);
        assertEq(redeem(SESSION_KEY, 10), 10);
        vm.expectEmit(address(escrow));
        emit IEscrow.SignerSet(client, session, START + exitDelay);
        vm.prank(client);
        escrow.setSigner(session, false);
        vm.warp(START + exitDelay - 1);
        assertEq(redeem(SESSION_KEY, 20), 10);
        vm.prank(client);
        escrow.setSigner(session, false); // does not lengthen it
        vm.warp(START + exitDelay);
        assertEq(redeem(SESSION_KEY, 30), 0);
        assertEq(redeem(CLIENT_KEY, 30), 10);
    }

    function test_revoking_an_unknown_signer_makes_it_no_signer() public {
        vm.prank(client);
        escrow.setSigner(session, false);
        assertEq(escrow.signers(client, session), 0);
    }

    function test_a_signer_signs_for_its_own_client_only() public {
        fund(client, node, 100);
        vm.prank(stranger);
        escrow.setSigner(session, true);
        assertEq(redeem(SESSION_KEY, 10), 0);
    }

    function testFuzz_redemptions_pay_exactly_what_is_due(uint96 funded, uint256[4] calldata totals) public {
        uint256 money = within(funded, 0, 1e6 ether);
        fund(client, node, money);
        uint256 highest;
        for (uint256 i = 0; i < 4; i++) {
            uint256 owed = totals[i] < money ? totals[i] : money;
            uint256 due = owed > highest ? owed - highest : 0;
            uint256 before = token.balanceOf(node);
            assertEq(redeem(CLIENT_KEY, totals[i]), due);
            assertEq(token.balanceOf(node) - before, due - due * feeBps / 10_000);
            if (owed > highest) highest = owed;
        }
        assertEq(token.balanceOf(address(escrow)), money - highest);
    }

    function testFuzz_no_other_bytes_are_the_clients_signature(bytes32 r, bytes32 vs, uint128 total) public {
        fund(client, node, 1e6 ether);
        Row[] memory list = rows(CLIENT_KEY, within(total, 1, type(uint128).max));
        if (r == list[0].r && vs == list[0].vs) return;
        (list[0].r, list[0].vs) = (r, vs);
        assertEq(escrow.redeem(node, list)[0], 0);
    }
}

/// Three clients with a session key each, three nodes, a stranger who signs in vain. Every call succeeds or is refused as it
/// must be; what must hold after each is checked at once, the rest in the invariants.
contract EscrowHandler is World {
    uint256 public funding;
    uint256 public outgoing;
    mapping(address client => mapping(address node => uint256)) public signed; // highest total by an authorized key
    mapping(address client => mapping(address node => uint256)) private exitedAt;

    function setUp() public override {
        super.setUp();
    }

    function book() external view returns (IEscrow, IToken) {
        return (escrow, token);
    }

    function clientKey(uint256 i) private pure returns (uint256) {
        return 100 + i % 3;
    }

    function clientAt(uint256 i) public pure returns (address) {
        return vm.addr(clientKey(i));
    }

    function nodeAt(uint256 i) public pure returns (address) {
        return vm.addr(300 + i % 3);
    }

    function put(uint256 c, uint256 n, uint256 amount) external {
        amount = within(amount, 0, 1000);
        fund(clientAt(c), nodeAt(n), amount);
        funding += amount;
    }

    function redeem(uint256 c, uint256 n, uint256 total, uint256 who) external {
        (address from, address to) = (clientAt(c), nodeAt(n));
        total = within(total, 0, 3000);
        uint256 key = who % 4 == 0 ? 999 : who % 4 == 1 ? clientKey(c) + 100 : clientKey(c);
        bool may = key == clientKey(c) || (key != 999 && block.timestamp < escrow.signers(from, vm.addr(key)));
        if (may && total > signed[from][to]) signed[from][to] = total;
        settle(row(key, from, to, total), to, may);
    }

    function settle(Row memory voucher, address to, bool may) private {
        Channel memory channel = escrow.channels(voucher.client, to);
        uint256 owed = voucher.total < channel.funded ? voucher.total : channel.funded;
        uint256 due = may && owed > channel.paid ? owed - channel.paid : 0;
        if (may && voucher.total >= channel.funded) assertLe(escrow.available(voucher.client, to), due, "E5: overstated");
        (uint256 purse, uint256 supply) = (token.balanceOf(to), token.totalSupply());

        Row[] memory list = new Row[](2); // the same row twice: the second pays nothing
        list[0] = list[1] = voucher;
        uint256[] memory amounts = escrow.redeem(to, list);

        assertEq(amounts[0], due); // E3
        assertEq(amounts[1], 0);
        assertEq(token.balanceOf(to) - purse + supply - token.totalSupply(), due);
        assertEq(escrow.channels(voucher.client, to).funded, channel.funded); // E4
        outgoing += due;
    }

    function exit(uint256 c, uint256 n, uint256 amount) external {
        (address from, address to) = (clientAt(c), nodeAt(n));
        uint128 wanted = some(from, to, amount);
        vm.prank(from);
        escrow.exit(to, wanted);
        exitedAt[from][to] = block.timestamp;
    }

    function exitWithSig(uint256 c, uint256 n, uint256 amount) external {
        (address from, address to) = (clientAt(c), nodeAt(n));
        uint128 wanted = some(from, to, amount);
        escrow.exitWithSig(
            to, wanted, exitOrder(clientKey(c), from, to, wanted, escrow.nonces(from), block.timestamp)
        );
        exitedAt[from][to] = block.timestamp;
    }

    function some(address from, address to, uint256 amount) private view returns (uint128) {
        Channel memory channel = escrow.channels(from, to);
        return uint128(within(amount, 0, channel.funded - channel.paid));
    }

    /// By anybody: the money goes to the client.
    function withdraw(uint256 c, uint256 n, address by) external {
        (address from, address to) = (clientAt(c), nodeAt(n));
        uint256 before = escrow.channels(from, to).funded;
        uint256 purse = token.balanceOf(from);
        vm.prank(by);
        try escrow.withdrawFor(from, to) {
            assertEq(token.balanceOf(from) - purse, before - escrow.channels(from, to).funded);
            assertLe(exitedAt[from][to] + 3 days, block.timestamp, "E4: too early");
            outgoing += before - escrow.channels(from, to).funded;
        } catch {
            assertEq(escrow.channels(from, to).funded, before);
        }
    }

    function refund(uint256 c, uint256 n, uint256 amount) external {
        (address from, address to) = (clientAt(c), nodeAt(n));
        Channel memory channel = escrow.channels(from, to);
        amount = within(amount, 0, channel.funded - channel.paid);
        vm.prank(to);
        escrow.refund(from, uint128(amount));
        outgoing += amount;
    }

    function setSigner(uint256 c, bool on) external {
        vm.prank(clientAt(c));
        escrow.setSigner(vm.addr(clientKey(c) + 100), on);
    }

    function pass(uint256 time) external {
        vm.warp(block.timestamp + within(time, 1, 2 days));
    }
}

contract EscrowInvariants is Invariants {
    EscrowHandler private handler;
    IEscrow private escrow;
    IToken private token;

    function setUp() public {
        handler = new EscrowHandler();
        actedOnBy(handler);
        (escrow, token) = handler.book();
    }

    function invariant_E1_the_balance_is_what_is_unpaid() public view {
        uint256 unpaid;
        for (uint256 i = 0; i < 9; i++) {
            Channel memory channel = escrow.channels(handler.clientAt(i / 3), handler.nodeAt(i));
            unpaid += channel.funded - channel.paid;
        }
        assertEq(token.balanceOf(address(escrow)), unpaid);
        assertEq(handler.funding() - handler.outgoing(), unpaid);
    }

    function invariant_E2_paid_is_funded_and_signed() public view {
        for (uint256 i = 0; i < 9; i++) {
            (address from, address to) = (handler.clientAt(i / 3), handler.nodeAt(i));
            Channel memory channel = escrow.channels(from, to);
            assertLe(channel.paid, channel.funded, "E2: paid above funded");
            assertLe(channel.paid, handler.signed(from, to), "E2: paid above signed");
        }
    }

    function invariant_E5_available_is_unpaid_at_most() public view {
        for (uint256 i = 0; i < 9; i++) {
            (address from, address to) = (handler.clientAt(i / 3), handler.nodeAt(i));
            Channel memory channel = escrow.channels(from, to);
            assertLe(escrow.available(from, to), channel.funded - channel.paid, "E5");
        }
    }
}
