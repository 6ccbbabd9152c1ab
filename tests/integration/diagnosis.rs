//! Diagnosis of image pulls against a real API server and real registries.

mod attacks;
mod broken;
mod rights;
mod secrecy;
mod setup;
