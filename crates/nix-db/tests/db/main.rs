//! Databases as Nix makes them, as they are not, and what is told of them.

mod databases;
mod graph;
mod index;
mod nix;
mod roots;
