//! What patterns mean, case by case, against the rules of the official runner's sources: `walk` is
//! `commands/helpers/file_archiver.go`, `glob` is `FilepathGlob` of its pattern library with links not
//! followed, `match` is that library's comparison of text, and `ours` is where we differ on purpose.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use camino::Utf8Path;

use super::{ArchiveError, Kind, Selection, UNTRACKED, Wanted, select};

const FILES: &[&str] = &[
    "README.md",
    "a.txt",
    "b.txt",
    ".hidden",
    ".config/x.yml",
    "dir/one.txt",
    "dir/two.log",
    "dir/sub/three.txt",
    "dir/sub/deep/four.txt",
    "dir/.dot/five.txt",
    "out/x86/bin",
    "out/arm/bin",
    "out/arm/lib.so.1",
    "[x]/y.txt",
    "x/y.txt",
    "sp ace/f.txt",
    "\u{e4}.txt",
    "back\\slash",
    "star*name",
    "q/a-b",
    "q/a]b",
];

fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for file in FILES {
        std::fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
        std::fs::write(root.join(file), file).unwrap();
    }
    std::fs::create_dir(root.join("empty")).unwrap();
    std::fs::write(root.join(OsStr::from_bytes(b"bad\xFF.bin")), "x").unwrap();
    for (link, target) in [
        ("link_file", "a.txt"),
        ("link_dir", "dir"),
        ("dangling", "nowhere"),
        ("dir/inner", "sub"),
        ("outside", "/etc"),
        ("loop", "loop"),
    ] {
        symlink(target, root.join(link)).unwrap();
    }
    dir
}

fn chosen(root: &Utf8Path, wanted: &Wanted) -> Selection {
    select(root, wanted, &AtomicBool::new(false)).unwrap()
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn names(selection: &Selection) -> Vec<String> {
    selection.entries.iter().map(|entry| String::from_utf8_lossy(&entry.name).into()).collect()
}

const DIR: &[&str] = &[
    "dir",
    "dir/.dot",
    "dir/.dot/five.txt",
    "dir/inner",
    "dir/one.txt",
    "dir/sub",
    "dir/sub/deep",
    "dir/sub/deep/four.txt",
    "dir/sub/three.txt",
    "dir/two.log",
];
const SUB: &[&str] = &["dir/sub", "dir/sub/deep", "dir/sub/deep/four.txt", "dir/sub/three.txt"];
const OUT: &[&str] =
    &["out", "out/arm", "out/arm/bin", "out/arm/lib.so.1", "out/x86", "out/x86/bin"];

/// The rule, the patterns, and what they select.
type Case = (&'static str, &'static [&'static str], &'static [&'static str]);

const PATHS: &[Case] = &[
    // walk: `findRelativePathInProject` and `processPath`.
    ("glob: a plain name is asked for", &["a.txt"], &["a.txt"]),
    ("glob: a name that is not there", &["none.txt"], &[]),
    ("walk: a directory matches itself and is walked", &["dir"], DIR),
    ("glob: Clean takes the last slash away", &["dir/"], DIR),
    ("glob: Clean takes several away", &["dir//"], DIR),
    ("glob: Clean takes dots away", &["./dir/./sub"], SUB),
    ("glob: Clean goes up inside the root", &["dir/sub/.."], DIR),
    ("walk: an empty directory is an entry", &["empty"], &["empty"]),
    ("walk: a last slash does not ask for a directory", &["a.txt/"], &["a.txt"]),
    ("glob: a name is no beginning of a name", &["di"], &[]),
    ("glob: nothing is inside a file", &["a.txt/x"], &[]),
    ("glob: case matters", &["A.TXT"], &[]),
    ("glob: a name beyond ASCII", &["\u{e4}.txt"], &["\u{e4}.txt"]),
    ("glob: blanks are characters", &["sp ace/f.txt"], &["sp ace/f.txt"]),
    ("walk: an absolute name inside the root", &["{root}/a.txt"], &["a.txt"]),
    ("walk: an absolute pattern inside the root", &["{root}/*.md"], &["README.md"]),
    ("walk: two patterns, one name", &["a.txt", "./a.txt"], &["a.txt"]),
    (
        "walk: the order of patterns is no order of entries",
        &["b.txt", "a.txt"],
        &["a.txt", "b.txt"],
    ),
    // glob: one star, one character.
    ("glob: a star", &["*.txt"], &["a.txt", "b.txt", "\u{e4}.txt"]),
    ("glob: a star takes no slash", &["dir/*.txt"], &["dir/one.txt"]),
    ("glob: a star takes dotfiles as well", &[".h*"], &[".hidden"]),
    (
        "glob: a star alone takes dotfiles",
        &["dir/*t"],
        &["dir/.dot", "dir/.dot/five.txt", "dir/one.txt"],
    ),
    ("glob: a star may stand for nothing", &["a.txt*"], &["a.txt"]),
    ("glob: several stars", &["o*t/*m/l*.so.*"], &["out/arm/lib.so.1"]),
    (
        "glob: a star in the middle means directories",
        &["out/*/bin"],
        &["out/arm/bin", "out/x86/bin"],
    ),
    (
        "walk: a directory that a star matches is walked",
        &["d*"],
        &[
            "dangling",
            "dir",
            "dir/.dot",
            "dir/.dot/five.txt",
            "dir/inner",
            "dir/one.txt",
            "dir/sub",
            "dir/sub/deep",
            "dir/sub/deep/four.txt",
            "dir/sub/three.txt",
            "dir/two.log",
        ],
    ),
    (
        "glob: Clean takes the slash after a star away",
        &["out/*/"],
        &["out/arm", "out/arm/bin", "out/arm/lib.so.1", "out/x86", "out/x86/bin"],
    ),
    ("glob: a question mark", &["?.txt"], &["a.txt", "b.txt", "\u{e4}.txt"]),
    ("glob: a question mark takes no slash", &["out?arm"], &[]),
    ("glob: a byte that is no character counts as one", &["bad?.bin"], &["bad\u{fffd}.bin"]),
    // glob: classes.
    ("glob: a class", &["[ab].txt"], &["a.txt", "b.txt"]),
    ("glob: a range", &["[b-z].txt"], &["b.txt"]),
    ("glob: a negated class", &["[!a].txt"], &["b.txt", "\u{e4}.txt"]),
    ("glob: negated the other way", &["[^a].txt"], &["b.txt", "\u{e4}.txt"]),
    ("glob: a class of one escaped bracket", &["[\\[]x]/y.txt"], &["[x]/y.txt"]),
    ("glob: a hyphen at the end is itself", &["q/a[x-]b"], &["q/a-b"]),
    ("glob: an escaped bracket in a class", &["q/a[\\]]b"], &["q/a]b"]),
    ("glob: a class matches before a name with brackets", &["[x]/y.txt"], &["x/y.txt"]),
    ("glob: escaped brackets in a plain name", &["\\[x\\]/y.txt"], &["[x]/y.txt"]),
    ("ours: escaped brackets before a star stay escaped", &["\\[x\\]/*"], &["[x]/y.txt"]),
    // glob: escapes.
    ("glob: an escaped star", &["star\\*name"], &["star*name"]),
    ("glob: a backslash in a plain name is a character", &["back\\slash"], &["back\\slash"]),
    ("glob: a backslash in a pattern is none", &["back\\\\sl*"], &["back\\slash"]),
    // glob: braces.
    ("glob: alternatives", &["{a,b}.txt"], &["a.txt", "b.txt"]),
    ("glob: alternatives with slashes", &["{dir/one,a}.txt"], &["a.txt", "dir/one.txt"]),
    ("glob: alternatives with stars", &["{R*,dir/t*}"], &["README.md", "dir/two.log"]),
    (
        "glob: alternatives inside alternatives",
        &["{a,{b,x/y}}.txt"],
        &["a.txt", "b.txt", "x/y.txt"],
    ),
    ("glob: two pairs of braces", &["{a,b}{.txt,.md}"], &["a.txt", "b.txt"]),
    ("glob: a first alternative of nothing", &["a{,x}.txt"], &["a.txt"]),
    ("glob: a last alternative of nothing is forgotten", &["a.txt{x,}"], &[]),
    ("glob: an alternative that is absolute finds nothing", &["{/etc,a.txt}"], &["a.txt"]),
    ("glob: an alternative that goes up finds nothing", &["{../*,a.txt}"], &["a.txt"]),
    ("glob: braces after a star", &["out/*/{bin,none}"], &["out/arm/bin", "out/x86/bin"]),
    // glob: two stars.
    (
        "glob: two stars take any number of directories",
        &["**/four.txt"],
        &["dir/sub/deep/four.txt"],
    ),
    ("glob: none of them, too", &["**/a.txt"], &["a.txt"]),
    ("glob: two stars in the middle", &["dir/**/four.txt"], &["dir/sub/deep/four.txt"]),
    ("glob: two stars between two names", &["dir/**/sub/three.txt"], &["dir/sub/three.txt"]),
    ("glob: two stars at the end take the directory itself", &["dir/sub/**"], SUB),
    (
        "glob: the same with a star",
        &["dir/sub/**/*"],
        &["dir/sub/deep", "dir/sub/deep/four.txt", "dir/sub/three.txt"],
    ),
    ("glob: two stars twice", &["**/deep/**"], &["dir/sub/deep", "dir/sub/deep/four.txt"]),
    ("glob: two stars go into dotted directories", &["**/five.txt"], &["dir/.dot/five.txt"]),
    ("glob: two stars that are not alone are one", &["dir/**.txt"], &["dir/one.txt"]),
    ("glob: the same the other way round", &["dir/t**"], &["dir/two.log"]),
    ("glob: two stars after a star", &["o*/**/bin"], &["out/arm/bin", "out/x86/bin"]),
    ("glob: two stars and a class", &["**/[ot]*.txt"], &["dir/one.txt", "dir/sub/three.txt"]),
    (
        "glob: two stars in braces",
        &["{out/**,dir/**/deep}"],
        &[
            "dir/sub/deep",
            "dir/sub/deep/four.txt",
            "out",
            "out/arm",
            "out/arm/bin",
            "out/arm/lib.so.1",
            "out/x86",
            "out/x86/bin",
        ],
    ),
    // Links.
    ("walk: a link is stored as a link", &["link_file"], &["link_file"]),
    ("walk: a link to a directory is not walked", &["link_dir"], &["link_dir"]),
    ("glob: a link to nothing is not there when asked for", &["dangling"], &[]),
    ("glob: but it is in a listing", &["dangl*"], &["dangling"]),
    ("glob: a link to itself", &["loop"], &[]),
    ("glob: a link before the first star is followed", &["link_dir/*.log"], &["link_dir/two.log"]),
    ("glob: so is one in a plain name", &["link_dir/sub/three.txt"], &["link_dir/sub/three.txt"]),
    ("glob: a link after a star is not", &["di*/inner/three.txt"], &[]),
    ("glob: nor is one that two stars meet", &["dir/**/three.txt"], &["dir/sub/three.txt"]),
    (
        "glob: links among alternatives are",
        &["di*/{inner,none}/three.txt"],
        &["dir/inner/three.txt"],
    ),
    (
        "ours: behind a link, but not with the link",
        &["link_dir/sub/**", "link_dir"],
        &[
            "link_dir/sub",
            "link_dir/sub/deep",
            "link_dir/sub/deep/four.txt",
            "link_dir/sub/three.txt",
        ],
    ),
    (
        "ours: links out of the root are stored, not followed",
        &["outside", "outside/pass*"],
        &["outside"],
    ),
];

#[test]
fn a_pattern_means_what_it_means_to_the_official_runner() {
    let tree = tree();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    assert!(PATHS.len() >= 60);
    for (rule, paths, expected) in PATHS {
        let paths = paths.iter().map(|path| path.replace("{root}", root.as_str())).collect();
        let wanted = Wanted { paths, ..Wanted::default() };
        let selection = chosen(root, &wanted);
        assert_eq!(names(&selection), *expected, "{rule}: {:?}", selection.warnings);
    }
}

#[test]
fn the_root_itself_can_be_meant() {
    // glob: `.` is looked up, `**` matches the directory that it begins in, `*` what is in it.
    let tree = tree();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    let all = |pattern: &str| {
        let paths = vec![pattern.replace("{root}", root.as_str())];
        chosen(root, &Wanted { paths, ..Wanted::default() })
    };
    let everything = all(".");
    assert_eq!(everything.entries[0].name, b".");
    assert_eq!(everything.entries[0].kind, Kind::Directory);
    assert!(everything.entries.len() > FILES.len() + 10);
    for pattern in ["./", "**", "**/", "{root}", "{root}/", "dir/.."] {
        assert_eq!(all(pattern).entries, everything.entries, "{pattern}");
    }
    for pattern in ["*", "**/*", "**/**/*"] {
        assert_eq!(all(pattern).entries, everything.entries[1..], "{pattern}");
    }
    assert_eq!(everything.found, [(".".to_owned(), everything.entries.len())]);
}

#[test]
fn exclusions_are_compared_with_whole_names() {
    let tree = tree();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    // Rule, patterns, exclusions, what is left, what was counted.
    type Excluding = (
        &'static str,
        &'static [&'static str],
        &'static [&'static str],
        &'static [&'static str],
        &'static [(&'static str, usize)],
    );
    let cases: &[Excluding] = &[
        ("match: a name", &["*.txt"], &["a.txt"], &["b.txt", "\u{e4}.txt"], &[("a.txt", 1)]),
        (
            "walk: a directory alone, not what is in it",
            &["dir/sub"],
            &["dir/sub"],
            &SUB[1..],
            &[("dir/sub", 1)],
        ),
        (
            "walk: a last slash changes nothing",
            &["dir/sub"],
            &["dir/sub/"],
            &SUB[1..],
            &[("dir/sub/", 1)],
        ),
        (
            "match: two stars take the directory as well",
            &["dir/sub"],
            &["dir/sub/**"],
            &[],
            &[("dir/sub/**", 4)],
        ),
        (
            "match: two stars and a star do not",
            &["dir/sub"],
            &["dir/sub/**/*"],
            &["dir/sub"],
            &[("dir/sub/**/*", 3)],
        ),
        ("match: a star takes no slash", &["out"], &["*bin"], OUT, &[]),
        (
            "match: two stars anywhere",
            &["out"],
            &["**/bin"],
            &["out", "out/arm", "out/arm/lib.so.1", "out/x86"],
            &[("**/bin", 2)],
        ),
        ("match: alternatives", &["*.txt"], &["{a,b}.txt"], &["\u{e4}.txt"], &[("{a,b}.txt", 2)]),
        (
            "match: a last alternative of nothing counts here",
            &["a.txt"],
            &["a.txt{x,}"],
            &[],
            &[("a.txt{x,}", 1)],
        ),
        ("match: a class", &["*.txt"], &["[a-b].txt"], &["\u{e4}.txt"], &[("[a-b].txt", 2)]),
        (
            "walk: the first that matches counts",
            &["a.txt"],
            &["*.txt", "a.txt"],
            &[],
            &[("*.txt", 1)],
        ),
        (
            "walk: an exact one may be first as well",
            &["a.txt"],
            &["a.txt", "*.txt"],
            &[],
            &[("a.txt", 1)],
        ),
        (
            "walk: made relative to the root",
            &["a.txt"],
            &["{root}/*.txt"],
            &[],
            &[("{root}/*.txt", 1)],
        ),
        (
            "ours: what two patterns meet is left out once",
            &["dir/sub", "dir/**/deep"],
            &["**/four.txt"],
            &["dir/sub", "dir/sub/deep", "dir/sub/three.txt"],
            &[("**/four.txt", 1)],
        ),
        (
            "ours: one outside does not end the others",
            &["*.txt"],
            &["../a.txt", "a.txt"],
            &["b.txt", "\u{e4}.txt"],
            &[("a.txt", 1)],
        ),
    ];
    for (rule, paths, exclude, left, counted) in cases {
        let exclude = exclude.iter().map(|one| one.replace("{root}", root.as_str())).collect();
        let wanted = Wanted { paths: strings(paths), exclude, untracked: Vec::new() };
        let selection = chosen(root, &wanted);
        let counted: Vec<_> =
            counted.iter().map(|(one, n)| (one.replace("{root}", root.as_str()), *n)).collect();
        assert_eq!(names(&selection), *left, "{rule}");
        assert_eq!(selection.excluded, counted, "{rule}");
    }
}

#[test]
fn what_selects_nothing_is_said_in_the_official_words() {
    let tree = tree();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    let outside =
        |path: &str| format!("artifact path is not a subpath of project directory: {path}");
    let missing = |path: &str| {
        format!(
            "{path}: no matching files. Ensure that the artifact path is relative to the working \
             directory ({root})"
        )
    };
    let cases: Vec<(&[&str], &[&str], Vec<String>)> = vec![
        (&["none"], &[], vec![missing("none")]),
        (&["none/*.x"], &[], vec![missing("none/*.x")]),
        (&["a.txt"], &["a.txt"], vec![missing("a.txt")]),
        (&[""], &[], vec!["No matching files. Path is empty.".into()]),
        (&["../x"], &[], vec![format!("processPath: {}", outside("../x"))]),
        (&[".."], &[], vec![format!("processPath: {}", outside(".."))]),
        (&["/etc/passwd"], &[], vec![format!("processPath: {}", outside("/etc/passwd"))]),
        (&["/*"], &[], vec![format!("processPath: {}", outside("/*"))]),
        (&["dir/*/../../../*"], &[], vec![format!("processPath: {}", outside("dir/*/../../../*"))]),
        (&["a.txt"], &["../*"], vec![format!("isExcluded: {}", outside("../*"))]),
        (&["[a"], &[], vec!["[a: syntax error in pattern".into()]),
        (&["{a"], &[], vec!["{a: syntax error in pattern".into()]),
        (&["a}"], &[], vec!["a}: syntax error in pattern".into()]),
        (&["[]a"], &[], vec!["[]a: syntax error in pattern".into()]),
        (&["a\\"], &[], vec!["a\\: syntax error in pattern".into()]),
        (
            &["outside/passwd"],
            &[],
            vec![
                "outside: not supported: outside build directory".into(),
                missing("outside/passwd"),
            ],
        ),
    ];
    for (paths, exclude, expected) in cases {
        let wanted =
            Wanted { paths: strings(paths), exclude: strings(exclude), untracked: Vec::new() };
        assert_eq!(chosen(root, &wanted).warnings, expected, "{paths:?}");
    }
}

#[test]
fn a_root_whose_name_looks_like_a_pattern_or_is_a_link() {
    let tree = tempfile::tempdir().unwrap();
    let root = tree.path().join("a[b]{c}*");
    std::fs::create_dir_all(root.join("x")).unwrap();
    std::fs::write(root.join("x/y"), "").unwrap();
    symlink(&root, tree.path().join("link")).unwrap();
    for root in [root, tree.path().join("link")] {
        let root = Utf8Path::from_path(&root).unwrap();
        for pattern in ["x/*", "{root}/x/*", "{root}/x/y"] {
            let paths = vec![pattern.replace("{root}", root.as_str())];
            let selection = chosen(root, &Wanted { paths, ..Wanted::default() });
            assert_eq!(names(&selection), ["x/y"], "{root} {pattern}");
        }
    }
}

#[test]
fn untracked_names_are_taken_as_git_lists_them() {
    let tree = tree();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    let untracked: &[&[u8]] =
        &[b"a.txt", b"bad\xFF.bin", b"dir/", b"gone", b"link_dir", b"link_dir/one.txt", b"../up"];
    let wanted = Wanted {
        paths: strings(&["a.txt"]),
        exclude: strings(&["link*"]),
        untracked: untracked.iter().map(|name| name.to_vec()).collect(),
    };
    let selection = chosen(root, &wanted);
    assert_eq!(names(&selection), ["a.txt", "bad\u{fffd}.bin", "dir"]);
    assert_eq!(selection.found, [("a.txt".to_owned(), 1), (UNTRACKED.to_owned(), 3)]);
    assert_eq!(selection.warnings, ["../up: not supported: outside build directory"]);
    assert_eq!(
        selection.report(),
        [
            "a.txt: found 1 matching artifact files and directories",
            "untracked: found 3 files",
            "link*: excluded 1 files",
        ]
    );
    let wanted = Wanted { untracked: vec![b"gone".to_vec()], ..Wanted::default() };
    assert_eq!(chosen(root, &wanted).warnings, ["untracked: no files"]);
}

#[test]
fn the_repository_itself_is_packed_with_a_warning() {
    let tree = tree();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    std::fs::create_dir(root.join(".git")).unwrap();
    std::fs::write(root.join(".git/config"), "").unwrap();
    let wanted = Wanted { paths: strings(&[".git/config"]), ..Wanted::default() };
    let selection = chosen(root, &wanted);
    assert_eq!(names(&selection), [".git/config"]);
    assert_eq!(
        selection.warnings,
        [
            "Part of .git directory is on the list of files to archive",
            "This may introduce unexpected problems",
        ]
    );
}

#[test]
fn special_files_and_what_may_not_be_read_are_found_all_the_same() {
    let tree = tempfile::tempdir().unwrap();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    let wanted = Wanted { paths: strings(&["*"]), ..Wanted::default() };
    let selection = chosen(root, &wanted);
    assert_eq!(selection.entries[0].kind, Kind::Special);
}

#[test]
fn ten_thousand_patterns_cost_one_walk() {
    let tree = tree();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    let mut paths: Vec<String> = (0..10_000).map(|n| format!("**/name-{n}.o")).collect();
    paths.push("**/four.txt".into());
    let exclude = (0..10_000).map(|n| format!("none/{n}")).collect();
    let selection = chosen(root, &Wanted { paths, exclude, untracked: Vec::new() });
    assert_eq!(names(&selection), ["dir/sub/deep/four.txt"]);
    assert_eq!(selection.warnings.len(), 10_000);
}

#[test]
fn braces_that_multiply_are_refused() {
    let tree = tree();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    let path = "{a,b}".repeat(40);
    let wanted =
        Wanted { paths: vec![path.clone()], exclude: vec![path.clone()], untracked: Vec::new() };
    let refused = format!("{path}: the pattern stands for more than 4096 patterns");
    assert_eq!(chosen(root, &wanted).warnings, [refused.clone(), refused]);
    let nested = "{a,".repeat(3000) + &"}".repeat(3000);
    chosen(root, &Wanted { paths: vec![nested], ..Wanted::default() });
}

#[test]
fn nobody_waits_for_a_selection_that_is_not_wanted() {
    let tree = tree();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    let wanted = Wanted { paths: strings(&["**"]), ..Wanted::default() };
    let error = select(root, &wanted, &AtomicBool::new(true)).unwrap_err();
    assert!(matches!(error, ArchiveError::Stopped));
    let gone = root.join("gone");
    let error = select(&gone, &wanted, &AtomicBool::new(false)).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot open {gone}"));
}

#[test]
fn what_changed_since_is_known() {
    let tree = tree();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    let selection = chosen(root, &Wanted { paths: strings(&["dir"]), ..Wanted::default() });
    let newer = |time| selection.is_newer_than(root, time, &AtomicBool::new(false)).unwrap();
    let changed = std::fs::metadata(root.join("dir/one.txt")).unwrap().modified().unwrap();
    assert!(newer(SystemTime::UNIX_EPOCH));
    assert!(!newer(changed + Duration::from_hours(1)));
}

#[test]
fn the_walk_and_the_comparison_agree_where_both_should() {
    // Everything that a pattern without braces selects by itself, a comparison of text matches too.
    let tree = tree();
    let root = Utf8Path::from_path(tree.path()).unwrap();
    let everything = chosen(root, &Wanted { paths: strings(&["**"]), ..Wanted::default() });
    for pattern in ["**/*.txt", "dir/*", "*/sub/*", "**/b*", "[a-o]*/**/bin", "out/**", "**/x86"] {
        let wanted = |exclude: &[&str]| Wanted {
            paths: strings(&["**"]),
            exclude: strings(exclude),
            untracked: Vec::new(),
        };
        let kept: BTreeSet<String> =
            names(&chosen(root, &wanted(&[pattern]))).into_iter().collect();
        let walked = chosen(root, &Wanted { paths: strings(&[pattern]), ..Wanted::default() });
        let walked: BTreeSet<String> = names(&walked).into_iter().collect();
        let excluded: BTreeSet<String> =
            names(&everything).into_iter().filter(|name| !kept.contains(name)).collect();
        assert!(excluded.is_subset(&walked), "{pattern}: {excluded:?} {walked:?}");
        assert!(!excluded.is_empty(), "{pattern}");
    }
}
