//! AoE initiator.
