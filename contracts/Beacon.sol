// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {BlockHeader} from "@openzeppelin/contracts/utils/BlockHeader.sol";
import {Memory} from "@openzeppelin/contracts/utils/Memory.sol";
import {IBeacon} from "./interfaces/IBeacon.sol";

/// @dev Invariant: one number has one answer, whoever asks and whenever.
contract Beacon is IBeacon {
    /// @inheritdoc IBeacon
    function randao(uint256 number, bytes calldata header) external view returns (bytes32) {
        bytes32 headerHash = keccak256(header);
        Memory.Slice[] memory fields = BlockHeader.parseHeader(header);
        uint256 found = BlockHeader.getNumber(fields);
        require(found == number, NotTheBlock(found, number));
        require(BlockHeader.verifyBlockHeader(fields, headerHash), NotTheHeader(number, headerHash));
        return BlockHeader.getPrevRandao(fields);
    }
}
