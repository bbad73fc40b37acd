// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IModels, Model} from "../interfaces/IModels.sol";
import {World, vm} from "./World.sol";

contract ModelsTest is World {
    bytes32 private constant MANIFEST = "manifest";

    function leaf(uint256 index) private pure returns (bytes32) {
        return keccak256(bytes.concat(keccak256(abi.encode(index, keccak256(abi.encode(index)), uint64(100 + index)))));
    }

    function pair(bytes32 a, bytes32 b) private pure returns (bytes32) {
        return a < b ? keccak256(abi.encode(a, b)) : keccak256(abi.encode(b, a));
    }

    function test_a_model_is_its_content() public {
        bytes32 id = keccak256(abi.encode(MANIFEST, bytes32("weights"), uint16(3)));
        vm.expectEmit(address(models));
        emit IModels.Added(id, MANIFEST, "weights", 3, stranger);
        vm.prank(stranger);
        assertEq(models.add(MANIFEST, "weights", 3), id);
        Model memory model = models.models(id);
        assertEq(model.manifest, MANIFEST);
        assertEq(model.weights, "weights");
        assertEq(model.layers, 3);
        assertEq(model.addedAt, START);
        assertEq(models.layersOf(id), 3);
        assertEq(models.layersOf("unknown"), 0);
    }

    function test_a_model_is_added_once() public {
        bytes32 id = models.add(MANIFEST, "weights", 3);
        vm.expectRevert(abi.encodeWithSelector(IModels.Known.selector, id));
        models.add(MANIFEST, "weights", 3);
        models.add(MANIFEST, "weights", 4);
    }

    function test_an_empty_part_is_refused() public {
        vm.expectRevert(abi.encodeWithSelector(IModels.BadModel.selector, bytes32(0), bytes32("weights"), 3));
        models.add(0, "weights", 3);
        vm.expectRevert(abi.encodeWithSelector(IModels.BadModel.selector, MANIFEST, bytes32(0), 3));
        models.add(MANIFEST, 0, 3);
        vm.expectRevert(abi.encodeWithSelector(IModels.BadModel.selector, MANIFEST, bytes32("weights"), 0));
        models.add(MANIFEST, "weights", 0);
    }

    function test_holds_its_pieces_and_no_others() public {
        // Three leaves: the third is promoted, its proof one step long.
        bytes32 inner = pair(leaf(0), leaf(1));
        bytes32 id = models.add(MANIFEST, pair(inner, leaf(2)), 1);
        bytes32[] memory two = new bytes32[](2);
        (two[0], two[1]) = (leaf(1), leaf(2));
        require(models.holds(id, leaf(0), two), "piece 0");
        require(!models.holds(id, leaf(2), two), "wrong proof");
        require(!models.holds(bert, leaf(0), two), "another model");
        bytes32[] memory one = new bytes32[](1);
        one[0] = inner;
        require(models.holds(id, leaf(2), one), "piece 2");
        require(!models.holds(id, leaf(3), one), "no piece");
        require(!models.holds("unknown", 0, new bytes32[](0)), "an unknown model holds nothing");
    }
}
