// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Burnable} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Burnable.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";
import {ERC3009} from "@openzeppelin/contracts/token/ERC20/extensions/draft-ERC3009.sol";
import {IToken} from "./interfaces/IToken.sol";

/// @dev Invariants: totalSupply == minted - burned; minted <= CAP; only MINTER raises `minted` after construction.
contract Token is ERC20, ERC20Burnable, ERC20Permit, ERC3009, IToken {
    uint256 public constant CAP = 1e9 ether;

    address public immutable MINTER;

    uint256 public minted;

    /// @param genesis the supply that `treasury` starts with.
    constructor(address minter, address treasury, uint256 genesis)
        ERC20("Tallystick", "TALLY")
        ERC20Permit("Tallystick")
    {
        MINTER = minter;
        _create(treasury, genesis);
    }

    /// @inheritdoc IToken
    function mint(address to, uint256 amount) external {
        require(msg.sender == MINTER, NotMinter(msg.sender, MINTER));
        _create(to, amount);
    }

    /// @inheritdoc IToken
    function burn(uint256 amount) public override(IToken, ERC20Burnable) {
        super.burn(amount);
    }

    function _create(address to, uint256 amount) private {
        minted += amount;
        require(minted <= CAP, CapExceeded(minted, CAP));
        _mint(to, amount);
    }
}
