//! The Bulkhead virtual machine monitor: device models, machine, launcher and control protocol.

pub mod control;
