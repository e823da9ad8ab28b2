//! Packing, unpacking, and archives that are made to hurt.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use camino::{Utf8Path, Utf8PathBuf};
use flate2::read::MultiGzDecoder;
use proptest::prelude::*;

use super::blocks::{Coding, Sink as _};
use super::out::Out;
use super::zip_out::{Meta, ZipOut};
use super::*;

static NEVER: AtomicBool = AtomicBool::new(false);

struct Bed {
    _dir: tempfile::TempDir,
    root: Utf8PathBuf,
}

fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let root = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
    Bed { _dir: dir, root }
}

impl Bed {
    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Utf8PathBuf {
        let path = self.root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    fn all(&self) -> Selection {
        self.some(&["**"])
    }

    fn some(&self, paths: &[&str]) -> Selection {
        let paths = paths.iter().map(|path| (*path).to_owned()).collect();
        select(&self.root, &Wanted { paths, ..Wanted::default() }, &NEVER).unwrap()
    }

    fn pack(&self, selection: &Selection, format: Format, level: Level) -> (File, Packed) {
        let mut file = tempfile::tempfile().unwrap();
        let packed = pack(&self.root, selection, format, level, &mut file, &NEVER).unwrap();
        assert_eq!(file.metadata().unwrap().len(), packed.bytes);
        (file, packed)
    }
}

fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn text(length: usize) -> Vec<u8> {
    let words = ["make", "install", "src/main.c", "error", "warning", "0x7f", "\n", "lib"];
    let order = noise(length / 3 + 1, 99);
    let mut text = Vec::new();
    for word in order {
        text.extend(words[usize::from(word) % words.len()].as_bytes());
        text.push(b' ');
    }
    text.truncate(length);
    text
}

/// What a tree is: kind, permissions, time and content by name.
fn picture(root: &Utf8Path) -> BTreeMap<String, (char, u32, i64, Vec<u8>)> {
    fn see(root: &Path, at: &Path, into: &mut BTreeMap<String, (char, u32, i64, Vec<u8>)>) {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let meta = std::fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(root).unwrap();
            let name = name.as_os_str().as_bytes().escape_ascii().to_string();
            let (kind, content) = if meta.is_symlink() {
                ('l', std::fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec())
            } else if meta.is_dir() {
                see(root, &path, into);
                ('d', Vec::new())
            } else {
                ('f', std::fs::read(&path).unwrap())
            };
            into.insert(name, (kind, meta.mode() & 0o777, meta.mtime(), content));
        }
    }
    let mut picture = BTreeMap::new();
    see(root.as_std_path(), root.as_std_path(), &mut picture);
    picture
}

/// A tree with everything in it that there can be.
fn rich() -> Bed {
    let bed = bed();
    bed.write("empty", "");
    bed.write("one", "x");
    bed.write("text", text(700_000));
    bed.write("noise", noise(600_000, 1));
    bed.write("exact", noise(256 * 1024, 2));
    bed.write("mixed", [text(300_000), noise(300_000, 3), text(10)].concat());
    bed.write("bin/tool", "#!/bin/sh\n");
    bed.write("sub/deep/\u{e4}", "umlaut");
    bed.write("back\\slash", "b");
    std::fs::write(bed.root.as_std_path().join(std::ffi::OsStr::from_bytes(b"bad\xFF")), "?")
        .unwrap();
    std::fs::create_dir(bed.root.join("hollow")).unwrap();
    symlink("sub/deep", bed.root.join("link")).unwrap();
    symlink("/nowhere/at/all", bed.root.join("sub/out")).unwrap();
    let mode = |name: &str, mode| {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(bed.root.join(name), permissions).unwrap();
    };
    mode("bin/tool", 0o755);
    mode("one", 0o600);
    mode("sub/deep", 0o555);
    for (number, name) in
        ["empty", "one", "bin/tool", "sub/deep", "hollow", "bin"].iter().enumerate()
    {
        let time = UNIX_EPOCH + Duration::from_secs(1_000_000_000 + number as u64);
        File::open(bed.root.join(name)).unwrap().set_modified(time).unwrap();
    }
    bed
}

#[test]
fn what_is_packed_comes_out_as_it_was() {
    let bed = rich();
    let selection = bed.all();
    let levels = [Level::Fastest, Level::Fast, Level::Default, Level::Slow, Level::Slowest];
    for format in [Format::Zip, Format::ZipZstd, Format::TarZstd] {
        for level in levels {
            let (file, packed) = bed.pack(&selection, format, level);
            assert_eq!(packed.warnings, [""; 0]);
            let there = self::bed();
            let unpacked = unpack(&file, &there.root, &Bounds::default(), &NEVER).unwrap();
            assert_eq!(picture(&there.root), picture(&bed.root), "{format:?} {level:?}");
            assert_eq!(unpacked.warnings, [""; 0]);
            // The root itself is an entry that needs no unpacking.
            assert_eq!(unpacked.files + 1, packed.files);
            let sum = Command::new("sha256sum").stdin(rewound(&file)).output().unwrap().stdout;
            let own: String = packed.sha256.iter().map(|byte| format!("{byte:02x}")).collect();
            assert!(sum.starts_with(own.as_bytes()));
        }
    }
}

fn rewound(file: &File) -> File {
    let mut file = file.try_clone().unwrap();
    file.rewind().unwrap();
    file
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let bed = rich();
    let selection = bed.all();
    for format in [Format::Zip, Format::ZipZstd, Format::TarZstd] {
        let (_, first) = bed.pack(&selection, format, Level::Default);
        for _ in 0..3 {
            assert_eq!(bed.pack(&bed.all(), format, Level::Default).1, first);
        }
    }
    // A file that is used again is emptied first.
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&noise(3_000_000, 1)).unwrap();
    let packed =
        pack(&bed.root, &selection, Format::Zip, Level::Default, &mut file, &NEVER).unwrap();
    assert_eq!(packed, bed.pack(&selection, Format::Zip, Level::Default).1);
}

#[test]
fn others_can_read_our_zips() {
    let bed = rich();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.zip");
    for level in [Level::Fastest, Level::Default] {
        let mut file = File::create_new(&path).unwrap();
        let packed = pack(&bed.root, &bed.all(), Format::Zip, level, &mut file, &NEVER).unwrap();
        let mut zip = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
        assert_eq!(zip.len() as u64, packed.files);
        let mut names = Vec::new();
        for index in 0..zip.len() {
            let mut entry = zip.by_index(index).unwrap();
            let name = entry.name_raw().to_vec();
            let real = bed.root.as_std_path().join(std::ffi::OsStr::from_bytes(&name));
            let meta = std::fs::symlink_metadata(real.components().as_path()).unwrap();
            assert_eq!(entry.unix_mode(), Some(meta.mode()), "{name:?}");
            assert_eq!(entry.is_dir(), meta.is_dir());
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            if meta.is_file() {
                assert_eq!(content, std::fs::read(&real).unwrap());
            }
            names.push(name);
        }
        assert!(names.is_sorted());
        // These know other corners of the format, where they are installed.
        let python =
            "import sys,zipfile; z=zipfile.ZipFile(sys.argv[1]); assert z.testzip() is None";
        for (program, args) in [("unzip", ["-tqq"].as_slice()), ("python3", &["-c", python])] {
            match Command::new(program).args(args).arg(&path).output() {
                Ok(output) => assert!(output.status.success(), "{program} {level:?}: {output:?}"),
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
            }
        }
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_vanishes_or_may_not_be_read_is_left_out() {
    let bed = bed();
    bed.write("a", "a");
    bed.write("b", "b");
    bed.write("c", "c");
    symlink("a", bed.root.join("l")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(bed.root.join("s")).unwrap();
    let selection = bed.some(&["*"]);
    std::fs::remove_file(bed.root.join("b")).unwrap();
    std::fs::remove_file(bed.root.join("c")).unwrap();
    symlink("/etc/passwd", bed.root.join("c")).unwrap();
    let warnings = [
        "File ignored: b: No such file or directory (os error 2)",
        "File ignored: c: Too many levels of symbolic links (os error 40)",
        "File ignored: s",
    ];
    for format in [Format::Zip, Format::TarZstd] {
        let (_, packed) = bed.pack(&selection, format, Level::Default);
        assert_eq!(packed.warnings, warnings, "{format:?}");
        assert_eq!(packed.files, 2);
    }
}

#[test]
fn gzip_is_one_member_for_each_file() {
    let bed = bed();
    let long = text(600_000);
    bed.write("r/junit.xml", &long);
    bed.write("r/\u{e4}.xml", "b");
    bed.write("z", "");
    let (file, packed) = bed.pack(&bed.some(&["r/*", "z"]), Format::Gzip, Level::Default);
    assert_eq!(packed.files, 3);
    let mut bytes = Vec::new();
    rewound(&file).read_to_end(&mut bytes).unwrap();
    let mut plain = Vec::new();
    MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut plain).unwrap();
    assert_eq!(plain, [&long, b"b".as_slice()].concat());
    let first = flate2::bufread::GzDecoder::new(bytes.as_slice());
    let header = first.header().unwrap();
    assert_eq!(header.filename(), Some(b"junit.xml".as_slice()));
    assert_eq!(header.comment(), Some(b"r/junit.xml".as_slice()));
    assert!(header.mtime() > 0);

    let selection = bed.some(&["r"]);
    let mut file = tempfile::tempfile().unwrap();
    let refused =
        pack(&bed.root, &selection, Format::Gzip, Level::Default, &mut file, &NEVER).unwrap_err();
    assert_eq!(refused.to_string(), "the \"r\" is not a regular file");
}

#[test]
fn raw_is_the_bytes_of_one_file() {
    let bed = bed();
    let bytes = noise(500_000, 4);
    bed.write("a.json", &bytes);
    bed.write("b.json", "{}");
    let (file, packed) = bed.pack(&bed.some(&["a.json"]), Format::Raw, Level::Default);
    let mut read = Vec::new();
    rewound(&file).read_to_end(&mut read).unwrap();
    assert_eq!(read, bytes);
    assert_eq!(packed.files, 1);
    let mut file = tempfile::tempfile().unwrap();
    let refused = |selection: &Selection, file: &mut File| {
        let result = pack(&bed.root, selection, Format::Raw, Level::Default, file, &NEVER);
        result.unwrap_err().to_string()
    };
    assert_eq!(refused(&bed.some(&["*"]), &mut file), "only one file can be sent as raw");
}

#[test]
fn packing_and_unpacking_end_when_nobody_wants_them() {
    let bed = rich();
    let stopped = AtomicBool::new(true);
    let (archive, _) = bed.pack(&bed.all(), Format::Zip, Level::Default);
    let (tar, _) = bed.pack(&bed.all(), Format::TarZstd, Level::Default);
    for format in [Format::Zip, Format::TarZstd] {
        let mut file = tempfile::tempfile().unwrap();
        let result = pack(&bed.root, &bed.all(), format, Level::Default, &mut file, &stopped);
        assert!(matches!(result, Err(ArchiveError::Stopped)), "{result:?}");
    }
    for archive in [archive, tar] {
        let result = unpack(&archive, &bed.root, &Bounds::default(), &stopped);
        assert!(matches!(result, Err(ArchiveError::Stopped)), "{result:?}");
    }
}

fn meta(name: &str, size: u64) -> Meta {
    Meta { name: name.into(), mode: 0o100_644, size, mtime: 1, ..Meta::default() }
}

fn done(plain: &[u8], last: bool) -> super::blocks::Done {
    let mut crc = crc32fast::Hasher::new();
    crc.update(plain);
    super::blocks::Done { coded: Vec::new(), plain: plain.to_vec().into(), crc, last }
}

#[test]
fn long_archives_and_many_entries_need_zip64() {
    let mut file = tempfile::tempfile().unwrap();
    let out = Out::new(&mut file).unwrap();
    let mut zip = ZipOut::new(out, Coding::Store);
    for number in 0..70_000 {
        let meta = Meta { content: Some(b"t".to_vec()), ..meta(&format!("{number:05}"), 1) };
        zip.begin(Meta { mode: 0o120_777, ..meta }).unwrap();
    }
    let (entries, ..) = zip.finish().unwrap();
    assert_eq!(entries, 70_000);
    assert_eq!(zip::ZipArchive::new(rewound(&file)).unwrap().len(), 70_000);
    let there = bed();
    let few = Bounds { entries: 69_999, ..Bounds::default() };
    let error = unpack(&file, &there.root, &few, &NEVER).unwrap_err();
    assert_eq!(error.to_string(), "the archive exceeds the limit of 69999 entries");

    // Five gigabytes of hole stand before this one, and it has a file that may be longer than four.
    let base = 5_u64 << 30;
    let mut file = tempfile::tempfile().unwrap();
    let out = Out::new(&mut file).unwrap();
    let mut zip = ZipOut::new(out, Coding::Store).behind(base);
    zip.begin(meta("long", 1 << 33)).unwrap();
    zip.block(done(&noise(1000, 1), false)).unwrap();
    zip.block(done(&noise(10, 2), true)).unwrap();
    zip.begin(meta("short", 3)).unwrap();
    zip.block(done(b"end", true)).unwrap();
    zip.finish().unwrap();
    let mut bytes = Vec::new();
    rewound(&file).read_to_end(&mut bytes).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes, base).unwrap();
    let mut zip = zip::ZipArchive::new(rewound(&file)).unwrap();
    assert_eq!(zip.by_name("long").unwrap().size(), 1010);
    let there = bed();
    unpack(&file, &there.root, &Bounds::default(), &NEVER).unwrap();
    assert_eq!(std::fs::read(there.root.join("short")).unwrap(), b"end");
    assert_eq!(std::fs::read(there.root.join("long")).unwrap().len(), 1010);
}

#[test]
fn what_is_there_gives_way() {
    let bed = bed();
    bed.write("file", "new");
    bed.write("dir/x", "x");
    bed.write("over_link", "new");
    symlink("file", bed.root.join("link")).unwrap();
    symlink("file", bed.root.join("over_dir")).unwrap();
    let (archive, _) = bed.pack(&bed.some(&["*"]), Format::Zip, Level::Default);
    let there = self::bed();
    let victim = there.write("victim", "keep me");
    there.write("file", "old and read-only");
    std::fs::set_permissions(there.root.join("file"), std::fs::Permissions::from_mode(0o444))
        .unwrap();
    symlink("victim", there.root.join("over_link")).unwrap();
    symlink("victim", there.root.join("dir")).unwrap();
    there.write("link", "a file");
    std::fs::create_dir(there.root.join("over_dir")).unwrap();
    let unpacked = unpack(&archive, &there.root, &Bounds::default(), &NEVER).unwrap();
    assert_eq!(unpacked.warnings, [""; 0]);
    assert_eq!(std::fs::read(&victim).unwrap(), b"keep me");
    std::fs::remove_file(victim).unwrap();
    assert_eq!(picture(&there.root), picture(&bed.root));
}

/// A zip by the crate's own hand, which asks no questions about names.
fn hostile(entries: &[(&str, &str, u32)]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let mut zip = ZipOut::new(Out::new(&mut file).unwrap(), Coding::Store);
    for (name, content, mode) in entries {
        let content = Some(content.as_bytes().to_vec());
        zip.begin(Meta { name: (*name).into(), mode: *mode, content, ..Meta::default() }).unwrap();
    }
    zip.finish().unwrap();
    file
}

const FILE: u32 = 0o100_644;
const LINK: u32 = 0o120_777;

/// The same as a tar.
fn hostile_tar(entries: &[(&str, &str, u32)]) -> File {
    let mut tar = Vec::new();
    for (name, content, mode) in entries {
        let mut header = tar::Header::new_gnu();
        let raw = header.as_gnu_mut().unwrap();
        raw.name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_mode(mode & 0o7777);
        if *mode == LINK {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_link_name_literal(content).unwrap();
            header.set_size(0);
        } else {
            header.set_size(content.len() as u64);
        }
        header.set_cksum();
        tar.extend(header.as_bytes());
        if *mode != LINK {
            tar.extend(content.as_bytes());
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
    }
    tar.extend([0; 1024]);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&zstd::encode_all(tar.as_slice(), 1).unwrap()).unwrap();
    file
}

#[test]
fn names_that_lead_out_are_refused_before_anything_is_written() {
    for (name, why) in [
        ("../x", "leads out of the directory"),
        ("a/../../x", "leads out of the directory"),
        ("a/..", "leads out of the directory"),
        ("/etc/x", "is an absolute name"),
        ("//x", "is an absolute name"),
        ("", "is no name"),
        ("a\0b", "is no name"),
    ] {
        let bed = bed();
        let into = bed.root.join("into");
        let archive = hostile(&[("first", "1", FILE), (name, "x", FILE)]);
        let error = unpack(&archive, &into, &Bounds::default(), &NEVER).unwrap_err();
        assert_eq!(error.to_string(), format!("the archive is damaged: {name:?} {why}"));
        assert!(!into.exists(), "{name}");
        if !name.is_empty() && !name.contains('\0') {
            let archive = hostile_tar(&[(name, "x", FILE)]);
            let error = unpack(&archive, &into, &Bounds::default(), &NEVER).unwrap_err();
            assert_eq!(error.to_string(), format!("the archive is damaged: {name:?} {why}"));
            assert_eq!(picture(&bed.root).len(), 1, "{name}");
        }
    }
}

#[test]
fn a_backslash_is_a_character_of_a_name() {
    let bed = bed();
    let archive = hostile(&[("..\\..\\x", "1", FILE), ("C:\\x", "2", FILE)]);
    unpack(&archive, &bed.root, &Bounds::default(), &NEVER).unwrap();
    assert_eq!(picture(&bed.root).keys().collect::<Vec<_>>(), ["..\\\\..\\\\x", "C:\\\\x"]);
}

#[test]
fn nothing_is_written_through_a_link() {
    let outside = bed();
    outside.write("passwd", "root");
    // The link comes with the archive, before or after what is behind it, or is there already.
    let target = outside.root.as_str();
    let through = [("l", target, LINK), ("l/passwd", "mine", FILE)];
    let after = [("l/passwd", "mine", FILE), ("l", target, LINK)];
    let deep = [("a/l", "../..", LINK), ("a/l/x/passwd", "mine", FILE)];
    for entries in [through.as_slice(), &after, &deep] {
        let bed = bed();
        let unpacked = unpack(&hostile(entries), &bed.root, &Bounds::default(), &NEVER).unwrap();
        assert_eq!(unpacked.warnings.len(), 1, "{:?}", unpacked.warnings);
        assert!(unpacked.warnings[0].contains("not unpacked, since"), "{:?}", unpacked.warnings);
        let bed = self::bed();
        let unpacked =
            unpack(&hostile_tar(entries), &bed.root, &Bounds::default(), &NEVER).unwrap();
        assert_eq!(unpacked.warnings.len(), 1, "{:?}", unpacked.warnings);
    }
    for make in [hostile, hostile_tar] {
        let bed = bed();
        symlink(target, bed.root.join("l")).unwrap();
        let archive =
            make(&[("l/passwd", "mine", FILE), ("l/new/x", "mine", FILE), ("m", "", FILE)]);
        let unpacked = unpack(&archive, &bed.root, &Bounds::default(), &NEVER).unwrap();
        assert_eq!(
            unpacked.warnings,
            [
                "l/passwd: not unpacked, since l is a link",
                "l/new/x: not unpacked, since l is a link",
            ]
        );
        assert_eq!(unpacked.files, 1);
    }
    assert_eq!(picture(&outside.root).len(), 1);
    assert_eq!(std::fs::read(outside.root.join("passwd")).unwrap(), b"root");
}

#[test]
fn the_repository_is_not_touched() {
    for make in [hostile, hostile_tar] {
        let bed = bed();
        bed.write(".git/config", "safe");
        let archive = make(&[
            (".git/config", "[core] fsmonitor = evil", FILE),
            ("./.git/hooks/post-checkout", "evil", FILE),
            (".GIT/config", "evil", FILE),
            (".git", "gitdir: elsewhere", FILE),
            ("sub/.gitignore", "fine", FILE),
            (".github/x", "fine", FILE),
        ]);
        let unpacked = unpack(&archive, &bed.root, &Bounds::default(), &NEVER).unwrap();
        assert_eq!(unpacked.files, 2);
        assert_eq!(
            unpacked.warnings,
            ["Part of .git directory is on the list of files to extract: 4 files ignored",]
        );
        assert_eq!(std::fs::read(bed.root.join(".git/config")).unwrap(), b"safe");
        assert_eq!(std::fs::read_dir(bed.root.join(".git")).unwrap().count(), 1);
    }
}

#[test]
fn names_that_come_twice_or_contradict_each_other() {
    let there = bed();
    let archive = hostile(&[("a", "1", FILE), ("b", "", FILE), ("./a", "2", FILE)]);
    let unpacked = unpack(&archive, &there.root, &Bounds::default(), &NEVER).unwrap();
    assert_eq!(unpacked.warnings, ["a: is in the archive twice, and the last one counts"]);
    assert_eq!(std::fs::read(there.root.join("a")).unwrap(), b"2");
    let archive = hostile(&[("a", "1", FILE), ("a/b", "2", FILE)]);
    let error = unpack(&archive, &there.root, &Bounds::default(), &NEVER).unwrap_err();
    let words = "the archive is damaged: \"a\" is both a file and a directory";
    assert_eq!(error.to_string(), words);
}

#[test]
fn rights_of_others_are_not_lent_and_directories_may_be_locked() {
    for make in [hostile, hostile_tar] {
        let there = bed();
        let archive = make(&[("tool", "x", 0o106_755), ("plain", "x", 0o100_000)]);
        unpack(&archive, &there.root, &Bounds::default(), &NEVER).unwrap();
        let mode = |name: &str| {
            std::fs::metadata(there.root.join(name)).unwrap().permissions().mode() & 0o7777
        };
        assert_eq!(mode("tool"), 0o755);
        assert_eq!(mode("plain"), 0);
    }
    let there = bed();
    let mut file = tempfile::tempfile().unwrap();
    let mut zip = ZipOut::new(Out::new(&mut file).unwrap(), Coding::Store);
    let directory = Meta { mode: 0o040_000, content: Some(Vec::new()), ..meta("d", 0) };
    zip.begin(directory.clone()).unwrap();
    zip.begin(Meta { name: b"d/e".to_vec(), ..directory }).unwrap();
    zip.begin(meta("d/e/f", 1)).unwrap();
    zip.block(done(b"x", true)).unwrap();
    zip.finish().unwrap();
    unpack(&file, &there.root, &Bounds::default(), &NEVER).unwrap();
    let locked = there.root.join("d");
    assert_eq!(std::fs::metadata(&locked).unwrap().permissions().mode() & 0o777, 0);
    std::fs::set_permissions(&locked, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::set_permissions(locked.join("e"), std::fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(std::fs::read(locked.join("e/f")).unwrap(), b"x");
}

#[test]
fn an_archive_may_be_unpacked_again() {
    let bed = rich();
    for format in [Format::Zip, Format::TarZstd] {
        let (archive, _) = bed.pack(&bed.all(), format, Level::Default);
        let there = self::bed();
        for _ in 0..2 {
            let unpacked = unpack(&archive, &there.root, &Bounds::default(), &NEVER).unwrap();
            assert_eq!(unpacked.warnings, [""; 0]);
            assert_eq!(picture(&there.root), picture(&bed.root));
        }
    }
}

#[test]
fn special_things_are_left_out() {
    let there = bed();
    let archive = hostile(&[("pipe", "", 0o010_644), ("dev", "", 0o020_644), ("x", "", FILE)]);
    let unpacked = unpack(&archive, &there.root, &Bounds::default(), &NEVER).unwrap();
    assert_eq!(unpacked.warnings, ["File ignored: pipe", "File ignored: dev"]);
    assert_eq!(unpacked.files, 1);
}

#[test]
fn bombs_are_refused_before_they_go_off() {
    let zeros = vec![0; 40 << 20];
    let bed = bed();
    bed.write("zeros", &zeros);
    let words = |archive: &File, bounds: &Bounds| {
        let there = self::bed();
        unpack(archive, &there.root, bounds, &NEVER).unwrap_err().to_string()
    };
    for format in [Format::Zip, Format::TarZstd] {
        let (archive, _) = bed.pack(&bed.some(&["*"]), format, Level::Fast);
        let bytes = Bounds { bytes: 1 << 20, ..Bounds::default() };
        assert_eq!(words(&archive, &bytes), "the archive exceeds the limit of 1048576 bytes");
        let ratio = Bounds { ratio: 20, ..Bounds::default() };
        assert_eq!(
            words(&archive, &ratio),
            "the archive exceeds the limit of 20 bytes for each byte"
        );
    }
    let none = Bounds { entries: 1, ..Bounds::default() };
    let two = [("a", "", FILE), ("b", "", FILE)];
    for archive in [hostile(&two), hostile_tar(&two)] {
        assert_eq!(words(&archive, &none), "the archive exceeds the limit of 1 entries");
    }
}

/// Finds a record of a zip, and lets it be changed.
fn tampered(archive: &File, record: &[u8], change: impl FnOnce(&mut [u8])) -> File {
    let mut bytes = Vec::new();
    rewound(archive).read_to_end(&mut bytes).unwrap();
    let at = bytes.windows(4).rposition(|window| window == record).unwrap();
    change(&mut bytes[at..]);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

#[test]
fn archives_that_lie_are_found_out() {
    let archive = hostile(&[("a", "aaaa", FILE), ("b", "bbbb", FILE)]);
    let central = b"PK\x01\x02";
    let put = |at: usize, bytes: &'static [u8]| {
        move |record: &mut [u8]| record[at..at + bytes.len()].copy_from_slice(bytes)
    };
    let cases: Vec<(File, &str)> = vec![
        (tampered(&archive, central, put(24, &[9])), "damaged: \"b\" is shorter than it says"),
        (tampered(&archive, central, put(24, &[3])), "damaged: \"b\" is longer than it says"),
        (tampered(&archive, central, put(16, &[0; 4])), "damaged: \"b\" has the wrong checksum"),
        (tampered(&archive, central, put(42, &[0; 4])), "damaged: its entries overlap"),
        (tampered(&archive, central, put(42, &[0xF0, 0xFF, 0, 0])), "damaged: b is out of place"),
        (tampered(&archive, central, put(20, &[0xFF; 4])), "damaged: b is out of place"),
        (tampered(&archive, central, put(8, &[1])), "cannot be unpacked: b is encrypted"),
        (
            tampered(&archive, central, put(10, &[12])),
            "cannot be unpacked: b is compressed with method 12",
        ),
        (tampered(&archive, central, put(10, &[8])), "damaged: \"b\" is corrupt"),
        (tampered(&archive, central, put(10, &[93])), "damaged: \"b\" is corrupt"),
        (tampered(&archive, central, put(0, b"XX")), "damaged: its directory is broken"),
        (
            tampered(&archive, b"PK\x05\x06", put(0, b"XX")),
            "damaged: it is no zip, or its end is missing",
        ),
        (
            tampered(&archive, b"PK\x05\x06", put(8, &[99, 0, 99])),
            "damaged: its directory is too short",
        ),
        (tampered(&archive, b"PK\x05\x06", put(4, &[1])), "damaged: it is one of several parts"),
        (
            tampered(&archive, b"PK\x05\x06", put(12, &[0xFF, 0xFF])),
            "damaged: its directory is out of place",
        ),
    ];
    for (archive, words) in cases {
        let there = bed();
        let error = unpack(&archive, &there.root, &Bounds::default(), &NEVER).unwrap_err();
        assert!(error.to_string().ends_with(words), "{error} / {words}");
    }
    let mut gzip = tempfile::tempfile().unwrap();
    gzip.write_all(b"\x1f\x8b\x08\0").unwrap();
    let there = bed();
    let error = unpack(&gzip, &there.root, &Bounds::default(), &NEVER).unwrap_err();
    assert_eq!(error.to_string(), "the archive cannot be unpacked: it is a gzip file");
    let empty = tempfile::tempfile().unwrap();
    let error = unpack(&empty, &there.root, &Bounds::default(), &NEVER).unwrap_err();
    assert_eq!(error.to_string(), "the archive is damaged: it is empty");
}

#[test]
fn something_may_stand_before_a_zip() {
    let archive = hostile(&[("a", "aaaa", FILE)]);
    let mut bytes = b"#!/bin/sh\nexit\n".to_vec();
    rewound(&archive).read_to_end(&mut bytes).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    let there = bed();
    unpack(&file, &there.root, &Bounds::default(), &NEVER).unwrap();
    assert_eq!(std::fs::read(there.root.join("a")).unwrap(), b"aaaa");
}

#[test]
fn a_torn_archive_is_an_error_wherever_it_is_torn() {
    let bed = bed();
    bed.write("a", text(20_000));
    bed.write("b/c", noise(5_000, 1));
    for format in [Format::Zip, Format::TarZstd] {
        let (archive, packed) = bed.pack(&bed.some(&["*"]), format, Level::Default);
        let mut bytes = Vec::new();
        rewound(&archive).read_to_end(&mut bytes).unwrap();
        for tenth in 0..10 {
            let mut torn = tempfile::tempfile().unwrap();
            let length = usize::try_from(packed.bytes).unwrap() * tenth / 10;
            torn.write_all(&bytes[..length]).unwrap();
            let there = self::bed();
            let error = unpack(&torn, &there.root, &Bounds::default(), &NEVER).unwrap_err();
            assert!(matches!(error, ArchiveError::Damaged { .. }), "{tenth}: {error}");
        }
    }
}

#[test]
fn a_zip_without_unix_modes_is_unpacked_with_ours() {
    let archive = hostile(&[("a", "aaaa", FILE), ("d/", "", 0)]);
    let dos = tampered(&archive, b"PK\x01\x02", |record| record[5] = 0);
    let there = bed();
    unpack(&dos, &there.root, &Bounds::default(), &NEVER).unwrap();
    assert!(there.root.join("d").is_dir());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_tree_survives_the_way(
        files in prop::collection::btree_map(
            "[a-c]{1,2}(/[a-c]{1,2}){0,2}x",
            (prop::collection::vec(any::<u8>(), 0..300), 0..3_usize, 0..0o1000_u32),
            0..12,
        ),
        zip in any::<bool>(),
    ) {
        let bed = bed();
        for (name, (content, repeat, mode)) in &files {
            let path = bed.write(name, content.repeat(1 + repeat * 700));
            // Readable for those who run this without being root.
            let mode = std::fs::Permissions::from_mode(mode | 0o400);
            std::fs::set_permissions(path, mode).unwrap();
        }
        let format = if zip { Format::Zip } else { Format::TarZstd };
        let (archive, _) = bed.pack(&bed.some(&["**/*"]), format, Level::Default);
        if files.is_empty() && !zip {
            return Ok(());
        }
        let there = self::bed();
        let unpacked = unpack(&archive, &there.root, &Bounds::default(), &NEVER).unwrap();
        prop_assert_eq!(unpacked.warnings, Vec::<String>::new());
        prop_assert_eq!(picture(&there.root), picture(&bed.root));
    }

    #[test]
    fn no_change_of_bytes_makes_more_than_an_error(
        at in 0..1000_usize, to in any::<u8>(), tar in any::<bool>(),
    ) {
        let entries = [("a", "aaaa", FILE), ("l", "a", LINK), ("d/e", "bbbb", FILE)];
        let archive = if tar { hostile_tar(&entries) } else { hostile(&entries) };
        let mut bytes = Vec::new();
        rewound(&archive).read_to_end(&mut bytes).unwrap();
        let at = at % bytes.len();
        bytes[at] = to;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let bed = bed();
        let into = bed.root.join("into");
        let bounds = Bounds { bytes: 1 << 20, ..Bounds::default() };
        match unpack(&file, &into, &bounds, &NEVER) {
            Ok(unpacked) => prop_assert!(unpacked.files <= 4),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
        // Whatever happens, it happens inside.
        let top: Vec<_> = std::fs::read_dir(&bed.root).unwrap().map(|e| e.unwrap().file_name()).collect();
        prop_assert!(top.iter().all(|name| name == "into"), "{:?}", top);
    }
}
