//! Git LFS: the batch API and the download of objects, for as long as the job token is valid.
//!
//! The objects are those in the served repository's own store; uploads are refused.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::reply::Reply;

const MEDIA_TYPE: &str = "application/vnd.git-lfs+json";

/// What a client asks for in one batch.
#[derive(Deserialize)]
struct Batch {
    operation: String,
    #[serde(default)]
    objects: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    oid: String,
    size: u64,
}

fn fail(status: u16, message: &str) -> Reply {
    let mut reply = Reply::message(status, message);
    reply.content_type = MEDIA_TYPE;
    reply
}

/// Gives an object's file, if the name is one.
fn file(store: &Path, oid: &str) -> Option<std::path::PathBuf> {
    let hexadecimal = oid.len() == 64 && oid.bytes().all(|byte| byte.is_ascii_hexdigit());
    let (first, second) = (oid.get(..2)?, oid.get(2..4)?);
    hexadecimal.then(|| store.join(first).join(second).join(oid))
}

/// Says where objects are downloaded; `base` is the address of the project's repository.
pub(super) fn batch(store: &Path, base: &str, authorization: &str, body: &[u8]) -> Reply {
    let Ok(batch) = serde_json::from_slice::<Batch>(body) else {
        return fail(422, "the batch cannot be read");
    };
    if batch.operation != "download" {
        return fail(403, "You are not allowed to push LFS objects to this project.");
    }
    let objects: Vec<Value> = batch
        .objects
        .iter()
        .map(|Object { oid, size }| {
            if file(store, oid).is_none_or(|path| !path.is_file()) {
                let error = json!({
                    "code": 404, "message": "Object does not exist on the server or you don't have permissions to access it"
                });
                return json!({ "oid": oid, "size": size, "error": error });
            }
            let download = json!({
                "href": format!("{base}/gitlab-lfs/objects/{oid}"),
                "header": { "Authorization": authorization },
            });
            let actions = json!({ "download": download });
            json!({ "oid": oid, "size": size, "authenticated": true, "actions": actions })
        })
        .collect();
    let mut reply =
        Reply::json(200, json!({ "transfer": "basic", "objects": objects }).to_string());
    reply.content_type = MEDIA_TYPE;
    reply
}

/// Gives an object.
pub(super) async fn object(store: &Path, oid: &str) -> Reply {
    let Some(path) = file(store, oid) else { return fail(404, "Not found") };
    match tokio::fs::read(path).await {
        Ok(bytes) => {
            let mut reply = Reply::json(200, bytes);
            reply.content_type = "application/octet-stream";
            reply
        }
        Err(_missing) => fail(404, "Not found"),
    }
}
