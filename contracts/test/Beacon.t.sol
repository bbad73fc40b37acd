// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IBeacon} from "../interfaces/IBeacon.sol";
import {CourtWorld} from "./CourtWorld.sol";
import {vm} from "./World.sol";

contract BeaconTest is CourtWorld {
    function mined(uint256 number, uint256 randao) private returns (bytes memory header) {
        header = headerOf(number, randao);
        vm.setBlockhash(number, keccak256(header));
    }

    function test_a_header_shows_its_blocks_randao() public {
        bytes memory header = mined(BLOCK - 1, 42);
        assertEq(uint256(beacon.randao(BLOCK - 1, header)), 42);
        vm.roll(BLOCK + 255);
        assertEq(uint256(beacon.randao(BLOCK - 1, header)), 42);
    }

    function test_another_number_is_refused() public {
        bytes memory header = mined(BLOCK - 1, 42);
        vm.expectRevert(abi.encodeWithSelector(IBeacon.NotTheBlock.selector, BLOCK - 1, BLOCK - 2));
        beacon.randao(BLOCK - 2, header);
    }

    function test_a_forged_header_is_refused() public {
        mined(BLOCK - 1, 42);
        bytes memory forged = headerOf(BLOCK - 1, 43);
        vm.expectRevert(abi.encodeWithSelector(IBeacon.NotTheHeader.selector, BLOCK - 1, keccak256(forged)));
        beacon.randao(BLOCK - 1, forged);
    }

    function test_a_block_to_come_has_no_header() public {
        bytes memory header = headerOf(BLOCK, 42);
        vm.expectRevert(abi.encodeWithSelector(IBeacon.NotTheHeader.selector, BLOCK, keccak256(header)));
        beacon.randao(BLOCK, header);
    }

    function test_what_is_no_header_is_refused() public view {
        try beacon.randao(BLOCK - 1, "") {
            revert("taken");
        } catch {}
        try beacon.randao(BLOCK - 1, hex"c20102") {
            revert("taken");
        } catch {}
    }

    /// EIP-2935: what the opcode has forgotten after 256 blocks, a contract remembers for 8,191.
    function test_an_older_header_is_looked_up_in_the_history() public {
        bytes memory header = headerOf(BLOCK - 1, 42);
        vm.roll(BLOCK + 5000);
        vm.etch(0x0000F90827F1C53a10cb7A02335B175320002935, address(new History(BLOCK - 1, keccak256(header))).code);
        assertEq(uint256(beacon.randao(BLOCK - 1, header)), 42);
    }
}

/// Answers as the history contract: 32 bytes in, the number; 32 bytes out, the hash.
contract History {
    uint256 private immutable NUMBER;
    bytes32 private immutable HASH;

    constructor(uint256 number, bytes32 hash) {
        (NUMBER, HASH) = (number, hash);
    }

    fallback(bytes calldata input) external returns (bytes memory) {
        return abi.encode(abi.decode(input, (uint256)) == NUMBER ? HASH : bytes32(0));
    }
}
