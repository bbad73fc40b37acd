// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC3009} from "@openzeppelin/contracts/interfaces/draft-IERC3009.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

/// @title The token: what nodes stake, what clients pay with
/// @notice ERC-20 with permit (ERC-2612), transfers by authorization (ERC-3009, random nonces) and burning. 18 decimals.
interface IToken is IERC20, IERC3009 {
    error NotMinter(address caller, address minter);
    error CapExceeded(uint256 minted, uint256 cap);

    /// @notice All that may ever be minted. Burning does not make room again.
    function CAP() external view returns (uint256);

    /// @notice The one address that may mint after construction.
    function MINTER() external view returns (address);

    /// @notice All that was ever minted, the burned included.
    function minted() external view returns (uint256);

    /// @notice Creates `amount` for `to`. Only the minter, up to the cap.
    function mint(address to, uint256 amount) external;

    /// @notice Destroys `amount` of the caller's tokens.
    function burn(uint256 amount) external;
}
