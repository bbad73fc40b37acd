// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {TimelockController} from "@openzeppelin/contracts/governance/TimelockController.sol";

/// @title The Court's governor: what a proposer announces, anybody may carry out NOTICE later
/// @dev Invariant: it calls the Court and itself (to change proposers, or to lengthen the delay) and nobody else, holds no
/// coins, and never with less than NOTICE between the announcement and the call.
contract Timelock is TimelockController {
    address public immutable COURT;
    uint256 public immutable NOTICE;

    error OnlyTheCourt(address target, address court);
    error TooShort(uint256 delay, uint256 notice);
    error NoCoins();

    /// @param proposers may announce, and take back what is announced.
    constructor(address court, uint256 notice, address[] memory proposers)
        TimelockController(notice, proposers, new address[](1), address(0))
    {
        COURT = court;
        NOTICE = notice;
    }

    receive() external payable override {
        revert NoCoins();
    }

    /// @notice Changes the delay of what is announced from now on; never below NOTICE. Only by itself.
    function updateDelay(uint256 newDelay) public override {
        require(newDelay >= NOTICE, TooShort(newDelay, NOTICE));
        super.updateDelay(newDelay);
    }

    function _execute(address target, uint256 value, bytes calldata data) internal override {
        require(target == COURT || target == address(this), OnlyTheCourt(target, COURT));
        super._execute(target, value, data);
    }
}
