//! Workspaces that travel.

use super::trial::{Checked, Done, Trial, ensure, get, put, story, variable};
use crate::{Filesystem, Pattern};

pub(super) async fn a_workspace_travels_and_its_outputs_come_home(
    trial: &mut Trial<'_>,
) -> Checked {
    if trial.backend.capabilities().filesystem != Filesystem::Sandbox {
        return Ok(Done::Skipped("the workspace is shared".to_owned()));
    }
    let workspace = trial.harness.workspace();
    let fails = |error: std::io::Error| error.to_string();
    std::fs::create_dir_all(workspace.join("sub/dir")).map_err(fails)?;
    put(&workspace, "sub/dir/in", "content")?;
    std::os::unix::fs::symlink("sub/dir/in", workspace.join("link")).map_err(fails)?;
    // Its own path, wherever it stands, means the copy.
    let mut spec = trial.travelling(
        format!(
            "[ \"$(pwd -P)\" = \"$(cd '{workspace}' && pwd -P)\" ] || exit 5\n\
             [ \"$(pwd -P)\" = \"$(cd \"$CF_HERE\" && pwd -P)\" ] || exit 6\n\
             [ \"$(cat link)\" = content ] || exit 7\n\
             : >'{workspace}/leaked'\n\
             mkdir -p out/deep && cp link out/deep/copy.txt && echo two >out/two.txt\n\
             ln -s two.txt out/ln && chmod 755 out/two.txt && echo x >unasked\n"
        ),
        workspace.clone(),
    );
    spec.env.push(variable("CF_HERE", workspace.as_str()));
    spec.outputs = vec![Pattern("out/**/*.txt".to_owned()), Pattern("nothing/*".to_owned())];
    let job = trial.submit(&spec).await?;
    trial.expect(&job, 0).await?;
    ensure!(get(&workspace, "leaked").is_err(), "the job ran in the workspace itself");
    trial.restart();
    for _ in 0..2 {
        trial.backend.collect(&job, &workspace).await.map_err(story("collect"))?;
        let copy = get(&workspace, "out/deep/copy.txt")?;
        ensure!(copy == b"content", "what came home is {copy:?}");
        ensure!(get(&workspace, "out/two.txt")? == b"two\n", "a second file is another one");
        ensure!(get(&workspace, "unasked").is_err(), "what nobody asked for came home");
    }
    Ok(Done::Checked)
}
