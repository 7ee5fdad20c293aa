//! Tells the crate what it is compiled for: hostdir's image is built for the same.

fn main() {
    let target = std::env::var("TARGET").expect("cargo sets TARGET");
    println!("cargo:rustc-env=HOSTDIR_TARGET={target}");
}
