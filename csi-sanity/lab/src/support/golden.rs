//! Files of pools as hostdir 389b711 wrote them. Every later version must serve them.

/// The id in [`POOL`].
pub const POOL_ID: &str = "ee05fa5e-7c0e-46f5-9f6a-9f3cc9a1d7a2";

/// `pool.json`.
pub const POOL: &str = r#"{
  "format": 1,
  "id": "ee05fa5e-7c0e-46f5-9f6a-9f3cc9a1d7a2",
  "created": "2026-08-01T10:20:30.123456789Z",
  "foreign": 4096
}"#;

/// `volume.json` of a volume of 1 MiB, with the UID of its HostVolume in elected mode.
pub fn record(id: &str, phase: &str, uid: Option<&str>) -> String {
    let uid = uid.map_or_else(String::new, |uid| format!("\n  \"uid\": \"{uid}\","));
    format!(
        r#"{{
  "format": 1,
  "id": "{id}",{uid}
  "name": "{id}",
  "bytes": 1048576,
  "directory": {{
    "mode": 504,
    "uid": 0,
    "gid": 0
  }},
  "poolId": "{POOL_ID}",
  "phase": "{phase}",
  "created": "2026-08-01T10:20:31.123456789Z"
}}
"#
    )
}
