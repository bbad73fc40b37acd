"""Where the engine was; it is `scheduling.engine`."""

from tallystick_node.scheduling.engine import Engine as Engine
