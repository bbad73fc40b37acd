// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @title Randomness: what the chain drew in one block, fixed in advance and proved later
interface IBeacon {
    error NotTheBlock(uint256 number, uint256 expected);
    error NotTheHeader(uint256 number, bytes32 headerHash);

    /// @notice The `prevrandao` of block `number`.
    /// @param header the block's header as RLP; its hash must be the chain's, which is known for 8,191 blocks (EIP-2935),
    /// on older chains for 256.
    function randao(uint256 number, bytes calldata header) external view returns (bytes32);
}
