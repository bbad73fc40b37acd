// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IToken} from "../interfaces/IToken.sol";
import {IERC20Metadata} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Metadata.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {IERC3009} from "@openzeppelin/contracts/interfaces/draft-IERC3009.sol";
import {World, vm} from "./World.sol";

contract TokenTest is World {
    function test_genesis_goes_to_the_treasury() public {
        IToken fresh = IToken(deploy("Token", abi.encode(node, client, 7 ether)));
        assertEq(fresh.balanceOf(client), 7 ether);
        assertEq(fresh.minted(), 7 ether);
        assertEq(fresh.MINTER(), node);
        assertEq(keccak256(bytes(IERC20Metadata(address(fresh)).name())), keccak256("Tallystick"));
        assertEq(keccak256(bytes(IERC20Metadata(address(fresh)).symbol())), keccak256("TALLY"));
    }

    function test_genesis_above_the_cap_is_refused() public {
        bytes memory code = initcode("Token", abi.encode(node, client, 1e9 ether + 1));
        vm.expectRevert(abi.encodeWithSelector(IToken.CapExceeded.selector, 1e9 ether + 1, 1e9 ether));
        create(code);
    }

    function test_only_the_minter_mints() public {
        token.mint(client, 5);
        assertEq(token.balanceOf(client), 5);
        vm.expectRevert(abi.encodeWithSelector(IToken.NotMinter.selector, stranger, address(this)));
        vm.prank(stranger);
        token.mint(stranger, 1);
    }

    function test_burning_makes_no_room_below_the_cap() public {
        token.mint(address(this), token.CAP() - token.minted());
        token.burn(3 ether);
        assertEq(token.totalSupply(), token.CAP() - 3 ether);
        vm.expectRevert(abi.encodeWithSelector(IToken.CapExceeded.selector, token.CAP() + 1, token.CAP()));
        token.mint(client, 1);
    }

    function test_permit_and_authorization_work() public {
        token.transfer(client, 10);
        bytes32 domain = separator("Tallystick", address(token));
        assertEq(IERC20Permit(address(token)).DOMAIN_SEPARATOR(), domain);
        bytes32 permit = keccak256(
            abi.encode(
                keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"),
                client, node, 4, 0, block.timestamp
            )
        );
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(CLIENT_KEY, keccak256(abi.encodePacked("\x19\x01", domain, permit)));
        IERC20Permit(address(token)).permit(client, node, 4, block.timestamp, v, r, s);
        assertEq(token.allowance(client, node), 4);

        bytes32 authorization = keccak256(
            abi.encode(
                keccak256(
                    "TransferWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
                ),
                client, node, 6, 0, block.timestamp + 1, bytes32("any nonce")
            )
        );
        (v, r, s) = vm.sign(CLIENT_KEY, keccak256(abi.encodePacked("\x19\x01", domain, authorization)));
        IERC3009(address(token)).transferWithAuthorization(
            client, node, 6, 0, block.timestamp + 1, "any nonce", v, r, s
        );
        assertEq(token.balanceOf(node), 6);
    }

    function testFuzz_supply_is_minted_less_burned(uint96 amount, uint96 ash) public {
        uint256 room = token.CAP() - token.minted();
        token.mint(address(this), within(amount, 0, room));
        uint256 burnt = within(ash, 0, token.balanceOf(address(this)));
        token.burn(burnt);
        assertEq(token.totalSupply(), token.minted() - burnt);
        assertLe(token.minted(), token.CAP(), "minted");
    }
}
