// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {Nonces} from "@openzeppelin/contracts/utils/Nonces.sol";
import {Authorization, Channel, Deposit, Exit, IEscrow, Order, Row} from "./interfaces/IEscrow.sol";
import {IStaking} from "./interfaces/IStaking.sol";
import {IToken} from "./interfaces/IToken.sol";

/// @dev Invariants:
/// (E1) the token balance is the sum of funded - paid over all channels (plus what strangers send here by mistake);
/// (E2) paid <= min(funded, the highest total that an authorized key signed);
/// (E3) a redemption pays exactly what is due, to the payee and the fire, and nothing when repeated;
/// (E4) `funded` falls only by the client's withdrawal, EXIT_DELAY after its exit, or by the node's own refund;
/// (E5) `available` is never more than a redemption in the same block would pay.
///
/// TOKEN is our own and calls nobody, so there is no reentrancy to guard against. There is no closed state: a channel
/// without money is empty, an old voucher stays a debt.
contract Escrow is IEscrow, EIP712, Nonces {
    bytes32 private constant VOUCHER_TYPEHASH = keccak256("Voucher(address client,address node,uint256 total)");
    bytes32 private constant EXIT_TYPEHASH =
        keccak256("Exit(address client,address node,uint128 amount,uint256 nonce,uint256 deadline)");
    bytes32 private constant SET_SIGNER_TYPEHASH =
        keccak256("SetSigner(address client,address signer,bool on,uint256 nonce,uint256 deadline)");
    uint256 private constant BPS = 10_000;

    IToken public immutable TOKEN;
    IStaking public immutable STAKING;
    uint256 public immutable FEE_BPS;
    uint256 public immutable EXIT_DELAY;
    uint256 public immutable EPOCH;

    mapping(address client => mapping(address node => Channel)) private _channels;
    mapping(address client => mapping(address node => Exit)) private _exits;
    mapping(address client => mapping(address signer => uint256 validUntil)) public signers;
    mapping(uint256 epoch => uint256) public burned;
    mapping(uint256 epoch => mapping(address node => uint256)) public burnedBy;

    constructor(IStaking staking, uint256 feeBps, uint256 exitDelay) EIP712("Tallystick Escrow", "1") {
        require(feeBps <= BPS, BadFee(feeBps, BPS));
        TOKEN = staking.TOKEN();
        STAKING = staking;
        FEE_BPS = feeBps;
        EXIT_DELAY = exitDelay;
        EPOCH = staking.EPOCH();
    }

    // Paying

    /// @inheritdoc IEscrow
    function fund(address client, Deposit[] calldata deposits) external {
        uint256 sum = _deposit(client, deposits, msg.sender);
        TOKEN.transferFrom(msg.sender, address(this), sum);
    }

    /// @inheritdoc IEscrow
    function fundWithAuthorization(address client, Deposit[] calldata deposits, Authorization calldata authorization)
        external
    {
        Authorization calldata a = authorization;
        bytes32 nonce = keccak256(abi.encode(client, deposits, a.salt));
        uint256 sum = _deposit(client, deposits, a.payer);
        TOKEN.receiveWithAuthorization(a.payer, address(this), sum, 0, a.validBefore, nonce, a.v, a.r, a.s);
    }

    /// @inheritdoc IEscrow
    function redeem(address node, Row[] calldata rows) external returns (uint256[] memory amounts) {
        amounts = new uint256[](rows.length);
        uint256 sum;
        for (uint256 i = 0; i < rows.length; i++) {
            uint256 due = _settle(node, rows[i]);
            amounts[i] = due;
            unchecked {
                sum += due;
            }
        }
        if (sum != 0) _pay(node, sum);
    }

    // Taking back

    /// @inheritdoc IEscrow
    function exit(address node, uint128 amount) external {
        _exit(msg.sender, node, amount);
    }

    /// @inheritdoc IEscrow
    function exitWithSig(address node, uint128 amount, Order calldata order) external {
        _check(order, keccak256(abi.encode(EXIT_TYPEHASH, order.client, node, amount, order.nonce, order.deadline)));
        _exit(order.client, node, amount);
    }

    /// @inheritdoc IEscrow
    function withdraw(address node) external {
        withdrawFor(msg.sender, node);
    }

    /// @inheritdoc IEscrow
    function withdrawFor(address client, address node) public {
        Exit memory leaving = _exits[client][node];
        require(leaving.amount != 0, NotExiting(client, node));
        require(block.timestamp >= leaving.readyAt, NotReady(block.timestamp, leaving.readyAt));
        uint256 unpaid = _unpaid(client, node);
        uint256 amount = leaving.amount < unpaid ? leaving.amount : unpaid;
        delete _exits[client][node];
        _channels[client][node].funded -= uint128(amount);
        emit Withdrawn(client, node, amount);
        TOKEN.transfer(client, amount);
    }

    /// @inheritdoc IEscrow
    function refund(address client, uint128 amount) external {
        uint256 unpaid = _unpaid(client, msg.sender);
        require(amount <= unpaid, TooMuch(amount, unpaid));
        _channels[client][msg.sender].funded -= amount;
        emit Refunded(client, msg.sender, amount);
        TOKEN.transfer(client, amount);
    }

    // Signers

    /// @inheritdoc IEscrow
    function setSigner(address signer, bool on) external {
        _setSigner(msg.sender, signer, on);
    }

    /// @inheritdoc IEscrow
    function setSignerWithSig(address signer, bool on, Order calldata order) external {
        _check(order, keccak256(abi.encode(SET_SIGNER_TYPEHASH, order.client, signer, on, order.nonce, order.deadline)));
        _setSigner(order.client, signer, on);
    }

    // Views

    /// @inheritdoc IEscrow
    function channels(address client, address node) external view returns (Channel memory) {
        return _channels[client][node];
    }

    /// @inheritdoc IEscrow
    function exits(address client, address node) external view returns (Exit memory) {
        return _exits[client][node];
    }

    /// @inheritdoc IEscrow
    function available(address client, address node) external view returns (uint256) {
        uint256 unpaid = _unpaid(client, node);
        uint256 leaving = _exits[client][node].amount;
        return unpaid > leaving ? unpaid - leaving : 0;
    }

    /// @inheritdoc IEscrow
    function nonces(address client) public view override(IEscrow, Nonces) returns (uint256) {
        return super.nonces(client);
    }

    function _deposit(address client, Deposit[] calldata deposits, address by) private returns (uint256 sum) {
        for (uint256 i = 0; i < deposits.length; i++) {
            Deposit calldata deposit = deposits[i];
            _channels[client][deposit.node].funded += deposit.amount;
            sum += deposit.amount;
            emit Funded(client, deposit.node, deposit.amount, by);
        }
    }

    function _exit(address client, address node, uint128 amount) private {
        uint256 unpaid = _unpaid(client, node);
        require(amount <= unpaid, TooMuch(amount, unpaid));
        uint64 readyAt = amount == 0 ? 0 : uint64(block.timestamp + EXIT_DELAY);
        _exits[client][node] = Exit(amount, readyAt);
        emit Exiting(client, node, amount, readyAt);
    }

    function _setSigner(address client, address signer, bool on) private {
        uint256 validUntil = signers[client][signer];
        uint256 end = block.timestamp + EXIT_DELAY;
        if (on) validUntil = type(uint256).max;
        // A second revocation does not lengthen the first.
        else if (validUntil > end) validUntil = end;
        signers[client][signer] = validUntil;
        emit SignerSet(client, signer, validUntil);
    }

    /// Uses up the order's nonce. Only the client itself signs orders: a session key may spend, and no more.
    function _check(Order calldata order, bytes32 structHash) private {
        require(block.timestamp <= order.deadline, Expired(block.timestamp, order.deadline));
        _useCheckedNonce(order.client, order.nonce);
        (address signer, ECDSA.RecoverError err,) =
            ECDSA.tryRecover(_hashTypedDataV4(structHash), order.r, order.vs);
        require(err == ECDSA.RecoverError.NoError && signer == order.client, NotSigned(order.client));
    }

    function _unpaid(address client, address node) private view returns (uint256) {
        Channel storage channel = _channels[client][node];
        return channel.funded - channel.paid;
    }

    /// Pays the node what its rows had due, less the fee, which burns.
    function _pay(address node, uint256 sum) private {
        uint256 epoch = block.timestamp / EPOCH;
        uint256 fee;
        // No overflow, nor where dues are added up: what is due lies here (E1), and what burns was minted before.
        unchecked {
            fee = sum * FEE_BPS / BPS;
            burned[epoch] += fee;
            burnedBy[epoch][node] += fee;
            sum -= fee;
        }
        TOKEN.burn(fee);
        TOKEN.transfer(STAKING.payeeOf(node), sum);
    }

    /// Books what a row has due; 0 if nothing is or if the signature is not the client's.
    function _settle(address node, Row calldata row) private returns (uint256 due) {
        (address client, uint256 total) = (row.client, row.total);
        Channel storage channel = _channels[client][node];
        (uint256 funded, uint256 paid) = (channel.funded, channel.paid);
        uint256 owed = total < funded ? total : funded;
        if (owed <= paid) return 0;
        bytes32 digest = _hashTypedDataV4(keccak256(abi.encode(VOUCHER_TYPEHASH, client, node, total)));
        if (!_isSigned(client, digest, row)) return 0;
        channel.paid = uint128(owed);
        unchecked {
            due = owed - paid; // owed > paid
        }
        emit Redeemed(client, node, due);
    }

    function _isSigned(address client, bytes32 digest, Row calldata row) private view returns (bool) {
        // Of what is no signature the signer is the zero address, which signs for nobody, itself included.
        (address signer,,) = ECDSA.tryRecover(digest, row.r, row.vs);
        return signer != address(0) && (signer == client || block.timestamp < signers[client][signer]);
    }
}
