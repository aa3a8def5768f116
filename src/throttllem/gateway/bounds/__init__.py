"""What all clients together may make the gateway hold: descriptors, connections, bytes."""
