// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IEscrow} from "./IEscrow.sol";
import {IStaking} from "./IStaking.sol";
import {IToken} from "./IToken.sol";

/// @title Rewards for work: less than the fees that the work burned, paid as stake
/// @notice Whoever pays itself through the protocol burns more than it gets back, whatever its share of the network.
interface IEmissions {
    event Rewarded(uint256 indexed epoch, address indexed node, uint256 amount);

    error Early(uint256 epoch, uint256 newest);
    error Claimed(uint256 epoch, address node);
    error InJail(address node);
    error NothingBurned(uint256 epoch, address node);
    error BadGamma(uint256 gammaBps, uint256 limit);
    error OverCap(uint256 planned, uint256 room);

    function TOKEN() external view returns (IToken);

    function STAKING() external view returns (IStaking);

    function ESCROW() external view returns (IEscrow);

    /// @notice The most of an epoch's burned fees that is minted again, in 1/10,000; below 10,000.
    function GAMMA_BPS() external view returns (uint256);

    /// @notice The most that is minted for one of the first HALVING epochs, in token base units.
    function BUDGET() external view returns (uint256);

    /// @notice After so many epochs the budget halves.
    function HALVING() external view returns (uint256);

    /// @notice The epoch of the deployment; there are no rewards for earlier ones.
    function START() external view returns (uint256);

    /// @notice Mints the node's reward for an epoch that is over into its stake. Anybody may, once per epoch and node.
    /// @dev A node whose stake that is not leaving would stay below MIN_STAKE is refused by Staking; it may claim once it has
    /// staked again, and one in jail once it has beaten. What nobody claims is not handed to others.
    /// @return amount `min(budget, GAMMA_BPS of all fees burned) * fees burned by the node / all fees burned`, rounded down.
    function claim(uint256 epoch, address node) external returns (uint256 amount);

    /// @notice The most that is minted for an epoch.
    function budget(uint256 epoch) external view returns (uint256);

    function claimed(uint256 epoch, address node) external view returns (bool);
}
