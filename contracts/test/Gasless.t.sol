// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Authorization, Channel, Deposit, IEscrow, Order} from "../interfaces/IEscrow.sol";
import {World, vm} from "./World.sol";

/// What a client signs and a stranger sends: the stranger pays the gas and decides nothing.
contract EscrowGaslessTest is World {
    bytes32 private constant SALT = "salt";

    uint256 private deadline = START + 60;

    function deposits() private view returns (Deposit[] memory list) {
        list = new Deposit[](2);
        list[0] = Deposit(node, 70);
        list[1] = Deposit(stranger, 30);
    }

    function authorized(uint256 key, address who, Deposit[] memory list, uint256 sum)
        private
        view
        returns (Authorization memory made)
    {
        bytes32 kind = keccak256(
            "ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
        );
        bytes32 nonce = keccak256(abi.encode(who, list, SALT));
        bytes32 structHash = keccak256(abi.encode(kind, vm.addr(key), escrow, sum, 0, deadline, nonce));
        bytes32 digest = keccak256(abi.encodePacked("\x19\x01", separator("Tallystick", address(token)), structHash));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        return Authorization(vm.addr(key), SALT, deadline, v, r, s);
    }

    function exitOrder(uint256 key, uint128 amount, uint256 nonce) private view returns (Order memory) {
        return exitOrder(key, client, node, amount, nonce, deadline);
    }

    function signerOrder(uint256 key, bool on, uint256 nonce) private view returns (Order memory) {
        bytes32 kind = keccak256("SetSigner(address client,address signer,bool on,uint256 nonce,uint256 deadline)");
        bytes32 structHash = keccak256(abi.encode(kind, client, session, on, nonce, deadline));
        return orderOf(key, client, nonce, deadline, structHash);
    }

    // Paying

    function test_a_payer_without_gas_funds_what_it_has_signed_for() public {
        token.transfer(session, 100);
        Authorization memory paper = authorized(SESSION_KEY, client, deposits(), 100);
        vm.expectEmit(address(escrow));
        emit IEscrow.Funded(client, node, 70, session);
        vm.prank(stranger);
        escrow.fundWithAuthorization(client, deposits(), paper);
        assertEq(escrow.available(client, node), 70);
        assertEq(escrow.available(client, stranger), 30);
        assertEq(token.balanceOf(address(escrow)), 100);
        assertEq(token.balanceOf(session), 0);
    }

    function test_who_sends_it_leads_nothing_elsewhere() public {
        token.transfer(session, 1000);
        Authorization memory paper = authorized(SESSION_KEY, client, deposits(), 100);
        bytes memory reason = abi.encodeWithSignature("ERC3009InvalidSignature()");
        Deposit[] memory turned = deposits();
        (turned[0].node, turned[1].node) = (stranger, node);
        vm.expectRevert(reason);
        escrow.fundWithAuthorization(client, turned, paper);
        vm.expectRevert(reason);
        escrow.fundWithAuthorization(stranger, deposits(), paper);
        turned = deposits();
        turned[1].amount = 31;
        vm.expectRevert(reason);
        escrow.fundWithAuthorization(client, turned, paper);
        paper.salt = "another";
        vm.expectRevert(reason);
        escrow.fundWithAuthorization(client, deposits(), paper);
    }

    function test_an_authorization_counts_once_and_in_time() public {
        token.transfer(session, 1000);
        Authorization memory paper = authorized(SESSION_KEY, client, deposits(), 100);
        vm.warp(deadline);
        vm.expectRevert(abi.encodeWithSignature("ERC3009InvalidAuthorizationTime(uint256,uint256)", 0, deadline));
        escrow.fundWithAuthorization(client, deposits(), paper);
        vm.warp(deadline - 1);
        escrow.fundWithAuthorization(client, deposits(), paper);
        bytes32 nonce = keccak256(abi.encode(client, deposits(), SALT));
        vm.expectRevert(abi.encodeWithSignature("ERC3009UsedAuthorization(address,bytes32)", session, nonce));
        escrow.fundWithAuthorization(client, deposits(), paper);
        assertEq(token.balanceOf(session), 900);
    }

    // Taking back

    function test_an_exit_is_sent_by_a_stranger_and_pays_the_client() public {
        fund(client, node, 100);
        vm.expectEmit(address(escrow));
        emit IEscrow.Exiting(client, node, 60, START + exitDelay);
        vm.prank(stranger);
        escrow.exitWithSig(node, 60, exitOrder(CLIENT_KEY, 60, 0));
        assertEq(escrow.available(client, node), 40);
        assertEq(escrow.nonces(client), 1);
        vm.warp(START + exitDelay - 1);
        vm.expectRevert(
            abi.encodeWithSelector(IEscrow.NotReady.selector, START + exitDelay - 1, START + exitDelay)
        );
        escrow.withdrawFor(client, node);
        vm.warp(START + exitDelay);
        vm.prank(stranger);
        escrow.withdrawFor(client, node);
        assertEq(token.balanceOf(client), 60);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotExiting.selector, client, node));
        escrow.withdrawFor(client, node);
    }

    function test_an_order_says_which_node_and_how_much() public {
        fund(client, node, 100);
        fund(client, stranger, 100);
        Order memory paper = exitOrder(CLIENT_KEY, 60, 0);
        bytes memory reason = abi.encodeWithSelector(IEscrow.NotSigned.selector, client);
        vm.expectRevert(reason);
        escrow.exitWithSig(node, 61, paper);
        vm.expectRevert(reason);
        escrow.exitWithSig(stranger, 60, paper);
        vm.expectRevert(reason);
        escrow.setSignerWithSig(node, true, paper);
        paper.deadline += 1;
        vm.expectRevert(reason);
        escrow.exitWithSig(node, 60, paper);
        assertEq(escrow.nonces(client), 0);
    }

    function test_only_the_client_itself_signs_orders() public {
        fund(client, node, 100);
        vm.prank(client);
        escrow.setSigner(session, true);
        bytes memory reason = abi.encodeWithSelector(IEscrow.NotSigned.selector, client);
        vm.expectRevert(reason);
        escrow.exitWithSig(node, 60, exitOrder(SESSION_KEY, 60, 0));
        vm.expectRevert(reason);
        escrow.setSignerWithSig(session, true, signerOrder(SESSION_KEY, true, 0));
        Order memory nobody = exitOrder(CLIENT_KEY, 60, 0);
        (nobody.client, nobody.r, nobody.vs) = (address(0), 0, 0);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotSigned.selector, address(0)));
        escrow.exitWithSig(node, 0, nobody);
    }

    function test_orders_count_once_in_their_order_and_in_time() public {
        fund(client, node, 100);
        Order memory first = exitOrder(CLIENT_KEY, 60, 0);
        Order memory second = exitOrder(CLIENT_KEY, 0, 1);
        vm.expectRevert(abi.encodeWithSignature("InvalidAccountNonce(address,uint256)", client, 0));
        escrow.exitWithSig(node, 0, second);
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.Expired.selector, deadline + 1, deadline));
        escrow.exitWithSig(node, 60, first);
        vm.warp(deadline);
        escrow.exitWithSig(node, 60, first);
        vm.expectRevert(abi.encodeWithSignature("InvalidAccountNonce(address,uint256)", client, 1));
        escrow.exitWithSig(node, 60, first);
        escrow.exitWithSig(node, 0, second);
        assertEq(escrow.available(client, node), 100);
    }

    function test_orders_bind_chain_and_contract() public {
        fund(client, node, 100);
        Order memory paper = exitOrder(CLIENT_KEY, 60, 0);
        uint256 home = block.chainid;
        vm.chainId(home + 1);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotSigned.selector, client));
        escrow.exitWithSig(node, 60, paper);
        vm.chainId(home);
        IEscrow other = IEscrow(deploy("Escrow", abi.encode(staking, feeBps, exitDelay)));
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotSigned.selector, client));
        other.exitWithSig(node, 60, paper);
    }

    function test_an_exit_that_is_too_large_uses_no_nonce() public {
        fund(client, node, 100);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooMuch.selector, 101, 100));
        escrow.exitWithSig(node, 101, exitOrder(CLIENT_KEY, 101, 0));
        assertEq(escrow.nonces(client), 0);
    }

    // Signers

    function test_a_signer_is_set_and_revoked_by_order() public {
        fund(client, node, 100);
        escrow.setSignerWithSig(session, true, signerOrder(CLIENT_KEY, true, 0));
        assertEq(escrow.redeem(node, rows(SESSION_KEY, 10))[0], 10);
        Order memory off = signerOrder(CLIENT_KEY, false, 1);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotSigned.selector, client));
        escrow.setSignerWithSig(session, true, off);
        escrow.setSignerWithSig(session, false, off);
        assertEq(escrow.signers(client, session), START + exitDelay);
    }

    function testFuzz_no_other_bytes_are_an_order(bytes32 r, bytes32 vs) public {
        fund(client, node, 100);
        Order memory paper = exitOrder(CLIENT_KEY, 60, 0);
        if (r == paper.r && vs == paper.vs) return;
        (paper.r, paper.vs) = (r, vs);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotSigned.selector, client));
        escrow.exitWithSig(node, 60, paper);
    }
}
