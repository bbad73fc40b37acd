// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {IModels, Model} from "./interfaces/IModels.sol";

/// @dev Invariant: an id, once known, answers the same forever.
contract Models is IModels {
    mapping(bytes32 id => Model) private _models;

    /// @inheritdoc IModels
    function add(bytes32 manifest, bytes32 weights, uint16 layers) external returns (bytes32 id) {
        require(manifest != 0 && weights != 0 && layers != 0, BadModel(manifest, weights, layers));
        id = keccak256(abi.encode(manifest, weights, layers));
        require(_models[id].layers == 0, Known(id));
        _models[id] = Model(manifest, weights, layers, uint48(block.timestamp));
        emit Added(id, manifest, weights, layers, msg.sender);
    }

    /// @inheritdoc IModels
    function models(bytes32 id) external view returns (Model memory) {
        return _models[id];
    }

    /// @inheritdoc IModels
    function layersOf(bytes32 id) external view returns (uint16) {
        return _models[id].layers;
    }

    /// @inheritdoc IModels
    function holds(bytes32 id, bytes32 leaf, bytes32[] calldata proof) external view returns (bool) {
        bytes32 root = _models[id].weights;
        // A zero root has no known preimage, but an unknown model with an empty proof would hold the zero leaf.
        return root != 0 && MerkleProof.verifyCalldata(proof, root, leaf);
    }
}
