fn main() -> anyhow::Result<()> {
    let cluster = hostdir_cluster::Cluster::up(2)?;
    println!("{}", cluster.kubectl.run(&["get", "nodes", "-o", "wide"])?);
    std::thread::sleep(std::time::Duration::from_secs(
        std::env::args().nth(1).map_or(5, |s| s.parse().unwrap()),
    ));
    Ok(())
}
