// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IEmissions} from "./interfaces/IEmissions.sol";
import {IEscrow} from "./interfaces/IEscrow.sol";
import {IStaking} from "./interfaces/IStaking.sol";
import {IToken} from "./interfaces/IToken.sol";

/// @dev Invariants:
/// (M1) a node's reward for an epoch is less than the fees that it burned in it, and is paid once;
/// (M2) all rewards of an epoch are at most its budget and GAMMA_BPS of the fees burned in it;
/// (M3) nothing is paid to a node in jail;
/// (M4) all budgets together fit what the token had left to mint at deployment.
///
/// TOKEN, STAKING and ESCROW are our own and call nobody else, so there is no reentrancy to guard against.
contract Emissions is IEmissions {
    uint256 private constant BPS = 10_000;

    IToken public immutable TOKEN;
    IStaking public immutable STAKING;
    IEscrow public immutable ESCROW;
    uint256 public immutable GAMMA_BPS;
    uint256 public immutable BUDGET;
    uint256 public immutable HALVING;
    uint256 public immutable EPOCH;
    uint256 public immutable START;

    mapping(uint256 epoch => mapping(address node => bool)) public claimed;

    constructor(IEscrow escrow, uint256 gammaBps, uint256 firstBudget, uint256 halving) {
        require(gammaBps < BPS, BadGamma(gammaBps, BPS));
        ESCROW = escrow;
        STAKING = escrow.STAKING();
        TOKEN = escrow.TOKEN();
        // The geometric series: halving * firstBudget * (1 + 1/2 + 1/4 + ...).
        (uint256 planned, uint256 room) = (2 * halving * firstBudget, TOKEN.CAP() - TOKEN.minted());
        require(planned <= room, OverCap(planned, room));
        GAMMA_BPS = gammaBps;
        BUDGET = firstBudget;
        HALVING = halving;
        EPOCH = escrow.EPOCH();
        START = block.timestamp / EPOCH;
        // Nothing lies here between transactions, so a standing approval risks nothing.
        TOKEN.approve(address(STAKING), type(uint256).max);
    }

    /// @inheritdoc IEmissions
    function claim(uint256 epoch, address node) external returns (uint256 amount) {
        uint256 newest = block.timestamp / EPOCH;
        require(epoch < newest, Early(epoch, newest));
        require(!claimed[epoch][node], Claimed(epoch, node));
        require(!STAKING.isJailed(node), InJail(node));
        uint256 own = ESCROW.burnedBy(epoch, node);
        require(own != 0, NothingBurned(epoch, node));
        uint256 all = ESCROW.burned(epoch);
        (uint256 pot, uint256 limit) = (all * GAMMA_BPS / BPS, budget(epoch));
        amount = (pot < limit ? pot : limit) * own / all;
        claimed[epoch][node] = true;
        emit Rewarded(epoch, node, amount);
        TOKEN.mint(address(this), amount);
        STAKING.stake(node, amount);
    }

    /// @inheritdoc IEmissions
    function budget(uint256 epoch) public view returns (uint256) {
        return epoch < START ? 0 : BUDGET >> (epoch - START) / HALVING;
    }
}
