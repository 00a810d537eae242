//! The program as its users meet it: bad inputs, interruptions, full disks, output for machines.

mod clips;
mod desk;
mod machines;
mod models;
mod runs;
