// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IStaking} from "./IStaking.sol";
import {IToken} from "./IToken.sol";

/// @notice What one client set aside for one node. paid <= funded.
/// @param funded everything put in, less what the client took out again or the node gave back.
/// @param paid everything redeemed, the fee included.
struct Channel {
    uint128 funded;
    uint128 paid;
}

/// @notice Money on its way back to the client. It is no longer money for the node.
struct Exit {
    uint128 amount;
    uint64 readyAt;
}

struct Deposit {
    address node;
    uint128 amount;
}

/// @notice A client's promise: `Voucher(address client,address node,uint256 total)`, signed in this contract's EIP-712 domain
/// ("Tallystick Escrow", "1"); (r, vs) is the ERC-2098 form, high s refused.
/// @param total what the client owes this node since the beginning of time, so a replay pays nothing.
struct Row {
    address client;
    uint256 total;
    bytes32 r;
    bytes32 vs;
}

/// @notice What a client signs so that somebody else sends it, in this contract's EIP-712 domain:
/// `Exit(address client,address node,uint128 amount,uint256 nonce,uint256 deadline)` and
/// `SetSigner(address client,address signer,bool on,uint256 nonce,uint256 deadline)`.
/// @param nonce `nonces(client)`: what is signed counts once, in order.
/// @param deadline the last second in which it counts.
struct Order {
    address client;
    uint256 nonce;
    uint256 deadline;
    bytes32 r;
    bytes32 vs;
}

/// @notice A payer's ERC-3009 authorization: `ReceiveWithAuthorization` to this contract, of the sum of the deposits, valid
/// from the beginning of time, with the nonce `keccak256(abi.encode(client, deposits, salt))`. So who sends it can lead no
/// unit of it elsewhere.
/// @param salt tells two payments of the same amounts apart.
/// @param validBefore it counts in blocks before this time.
struct Authorization {
    address payer;
    bytes32 salt;
    uint256 validBefore;
    uint8 v;
    bytes32 r;
    bytes32 s;
}

/// @title Payments: prefunded one-way channels, one per client and node, settled by cumulative vouchers
/// @notice Amounts are token base units, times seconds.
interface IEscrow {
    event Funded(address indexed client, address indexed node, uint256 amount, address indexed by);
    /// @notice `amount` includes the fee. Only rows that paid something have an event. What the payee got and what was burned
    /// stand in the token's two Transfer events that follow the rows.
    event Redeemed(address indexed client, address indexed node, uint256 amount);
    event Exiting(address indexed client, address indexed node, uint256 amount, uint256 readyAt);
    event Withdrawn(address indexed client, address indexed node, uint256 amount);
    event Refunded(address indexed client, address indexed node, uint256 amount);
    event SignerSet(address indexed client, address indexed signer, uint256 validUntil);

    error BadFee(uint256 feeBps, uint256 maximum);
    error TooMuch(uint256 amount, uint256 available);
    error NotExiting(address client, address node);
    error NotReady(uint256 time, uint256 readyAt);
    error Expired(uint256 time, uint256 deadline);
    error NotSigned(address client);

    function TOKEN() external view returns (IToken);

    function STAKING() external view returns (IStaking);

    /// @notice The part of every redemption that is burned, in 1/10,000, rounded down.
    function FEE_BPS() external view returns (uint256);

    /// @notice Seconds between `exit` and `withdraw`, and between a signer's revocation and its end.
    function EXIT_DELAY() external view returns (uint256);

    /// @notice Seconds per epoch, the Staking contract's.
    function EPOCH() external view returns (uint256);

    /// @notice Puts the caller's tokens into `client`'s channels, all in one transfer. Anybody may, for anybody.
    function fund(address client, Deposit[] calldata deposits) external;

    /// @notice `fund` with a payer's tokens that it has authorized, sent by anybody: the payer needs no coin for gas.
    function fundWithAuthorization(address client, Deposit[] calldata deposits, Authorization calldata authorization)
        external;

    /// @notice Pays `node` what is due by these vouchers, to its payee. Anybody may call.
    /// Per row `min(total, funded) - paid` is due: a voucher above the funds is paid in part and keeps the rest. A row with
    /// nothing due or a wrong signature pays 0 and stops nobody else's.
    /// @return amounts what each row paid, the fee included.
    function redeem(address node, Row[] calldata rows) external returns (uint256[] memory amounts);

    /// @notice Begins to take `amount` out of the caller's channel. Replaces an earlier exit and restarts the delay;
    /// 0 calls it off. Vouchers can be redeemed meanwhile.
    function exit(address node, uint128 amount) external;

    /// @notice `exit` of the client who has signed the order, sent by anybody.
    function exitWithSig(address node, uint128 amount, Order calldata order) external;

    /// @notice Ends the caller's exit: pays back its amount, or what is left if that is less.
    function withdraw(address node) external;

    /// @notice `withdraw` of any client, sent by anybody. The money goes to the client.
    function withdrawFor(address client, address node) external;

    /// @notice Gives unspent money of the caller's channel back to the client at once. For the node.
    function refund(address client, uint128 amount) external;

    /// @notice Lets `signer` sign vouchers for the caller (`on`), or stops it, `EXIT_DELAY` from now.
    function setSigner(address signer, bool on) external;

    /// @notice `setSigner` of the client who has signed the order, sent by anybody.
    function setSignerWithSig(address signer, bool on, Order calldata order) external;

    function channels(address client, address node) external view returns (Channel memory);

    function exits(address client, address node) external view returns (Exit memory);

    /// @notice The nonce of the client's next order.
    function nonces(address client) external view returns (uint256);

    /// @notice The signer's vouchers count before this time. 0: never.
    function signers(address client, address signer) external view returns (uint256 validUntil);

    /// @notice What the node can count on: neither paid nor exiting. Money whose exit is ready but not withdrawn does not
    /// count either, for it can be gone within the block.
    function available(address client, address node) external view returns (uint256);

    /// @notice Fees burned in an epoch.
    function burned(uint256 epoch) external view returns (uint256);

    /// @notice Fees burned in an epoch by the redemptions of one node.
    function burnedBy(uint256 epoch, address node) external view returns (uint256);
}
