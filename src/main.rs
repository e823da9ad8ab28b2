//! The program `bridge` with the drivers that come with it.

fn main() -> std::process::ExitCode {
    bridge::main(bridge::Registry::builtin())
}
