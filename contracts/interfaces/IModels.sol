// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @notice A model's content, by hash. It never changes.
/// @param manifest SHA-256 digest of the manifest: one raw block of canonical dag-json, its CIDv1 rebuilt off chain.
/// @param weights Merkle root over the manifest's pieces, see `holds`.
/// @param layers number of layers; spans are half-open ranges within [0, layers).
struct Model {
    bytes32 manifest;
    bytes32 weights;
    uint16 layers;
    uint48 addedAt;
}

/// @title The catalogue of models
/// @notice Anybody adds, nobody owns, changes or removes. The id is the content, so front-running gains nothing.
interface IModels {
    event Added(bytes32 indexed id, bytes32 manifest, bytes32 weights, uint16 layers, address indexed by);

    error Known(bytes32 id);
    error BadModel(bytes32 manifest, bytes32 weights, uint16 layers);

    /// @notice Adds a model. `id = keccak256(abi.encode(bytes32 manifest, bytes32 weights, uint16 layers))`.
    function add(bytes32 manifest, bytes32 weights, uint16 layers) external returns (bytes32 id);

    /// @notice The model, all zero when unknown.
    function models(bytes32 id) external view returns (Model memory);

    /// @notice The number of layers, 0 when unknown.
    function layersOf(bytes32 id) external view returns (uint16);

    /// @notice Is `leaf` one of the model's pieces? False for an unknown model.
    /// @dev The tree, exactly:
    /// - The pieces in the manifest's order: embed, layers, shared, head; `index` counts them from 0.
    /// - leaf = keccak256(bytes.concat(keccak256(abi.encode(uint256 index, bytes32 cidDigest, uint64 byteLength)))), where
    ///   `cidDigest` is the 32-byte SHA-256 digest inside the piece's CID and `byteLength` the length of the piece's file.
    /// - A level's nodes 2k and 2k+1 become keccak256(min(a, b) ‖ max(a, b)), by value as 256-bit numbers; an odd last node
    ///   moves up as it is. Repeat until one is left: the root. One piece: the root is its leaf.
    /// - The proof holds the siblings from the leaf upwards; a level at which the node is promoted adds none.
    function holds(bytes32 id, bytes32 leaf, bytes32[] calldata proof) external view returns (bool);
}
