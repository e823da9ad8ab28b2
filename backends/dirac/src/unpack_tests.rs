use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use super::*;

/// An archive as somebody who means harm writes it: names as they are.
struct Evil(Vec<u8>);

impl Evil {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn add(mut self, kind: u8, name: &str, link: &str, mode: u32, content: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(mode);
        header.set_mtime(1_000_000_000);
        header.set_size(u64::try_from(content.len()).unwrap());
        let bytes = header.as_mut_bytes();
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        bytes[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.add(b'0', name, "", 0o644, content.as_bytes())
    }

    fn unpack_within(mut self, into: &Utf8Path, most: u64, entries: u64) -> io::Result<()> {
        self.0.resize(self.0.len() + 1024, 0);
        unpack_tar(Box::new(io::Cursor::new(self.0)), into, most, entries)
    }

    fn unpack(self, into: &Utf8Path) -> io::Result<()> {
        self.unpack_within(into, 1 << 20, 1000)
    }
}

fn place() -> (tempfile::TempDir, camino::Utf8PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let into = camino::Utf8PathBuf::from_path_buf(dir.path().join("project")).unwrap();
    fs::create_dir(&into).unwrap();
    fs::write(dir.path().join("outside"), "untouched").unwrap();
    (dir, into)
}

fn unharmed(dir: &tempfile::TempDir) {
    assert_eq!(fs::read(dir.path().join("outside")).unwrap(), b"untouched");
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn no_name_leads_out() {
    let (dir, into) = place();
    let absolute = dir.path().join("abs").to_str().unwrap().to_owned();
    Evil::new()
        .file("../outside", "x")
        .file("a/../../outside", "x")
        .file("..", "x")
        .file(&absolute, "x")
        .add(b'5', "../d", "", 0o755, b"")
        .file("./good//file", "y")
        .unpack(&into)
        .unwrap();
    unharmed(&dir);
    assert_eq!(fs::read(into.join("good/file")).unwrap(), b"y");
}

#[test]
fn no_link_leads_out() {
    let (dir, into) = place();
    let out = dir.path().to_str().unwrap();
    // One was there before, from the repository.
    symlink(dir.path(), into.join("old")).unwrap();
    Evil::new()
        .add(b'2', "up", "..", 0o777, b"")
        .file("up/outside", "x")
        .add(b'2', "abs", out, 0o777, b"")
        .add(b'5', "abs", "", 0o700, b"")
        .file("abs/new", "x")
        .file("old/new", "x")
        .add(b'2', "direct", "../outside", 0o777, b"")
        .file("direct", "x")
        .add(b'2', "again", "../outside", 0o777, b"")
        .add(b'1', "hard1", "again", 0o644, b"")
        .add(b'1', "hard2", "../outside", 0o644, b"")
        .add(b'1', "hard3", &format!("{out}/outside"), 0o644, b"")
        .add(b'2', "dots", "..", 0o777, b"")
        .add(b'1', "hard4", "dots/outside", 0o644, b"")
        .unpack(&into)
        .unwrap();
    unharmed(&dir);
    for name in ["up/outside", "abs/new", "old/new", "direct"] {
        assert_eq!(fs::read(into.join(name)).unwrap(), b"x", "{name}");
        assert!(into.join(name).parent().unwrap().symlink_metadata().unwrap().is_dir());
    }
    for name in ["hard1", "hard2", "hard3", "hard4"] {
        assert!(!into.join(name).exists(), "{name}");
    }
    // A link itself is a thing like others.
    assert_eq!(fs::read_link(into.join("again")).unwrap().to_str(), Some("../outside"));
}

#[test]
fn devices_and_lent_rights_stay_behind() {
    let (_dir, into) = place();
    Evil::new()
        .add(b'3', "device", "", 0o666, b"")
        .add(b'4', "disk", "", 0o666, b"")
        .add(b'6', "pipe", "", 0o666, b"")
        .add(b'S', "sparse", "", 0o666, b"")
        .add(b'0', "root", "", 0o6755, b"#!/bin/sh\n")
        .add(b'0', "secret", "", 0o000, b"z")
        .add(b'5', "closed", "", 0o000, b"")
        .file("closed/file", "z")
        .unpack(&into)
        .unwrap();
    for name in ["device", "disk", "pipe", "sparse"] {
        assert!(into.join(name).symlink_metadata().is_err(), "{name}");
    }
    let mode = |name| fs::metadata(into.join(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode("root"), 0o755);
    assert_eq!(mode("secret"), 0o400);
    assert_eq!(mode("closed"), 0o700);
    assert_eq!(fs::metadata(into.join("root")).unwrap().mtime(), 1_000_000_000);
}

#[test]
fn what_stands_in_the_way_is_replaced() {
    let (_dir, into) = place();
    fs::create_dir_all(into.join("tree/deep")).unwrap();
    fs::write(into.join("tree/deep/file"), "old").unwrap();
    fs::write(into.join("file"), "old").unwrap();
    fs::write(into.join("locked"), "old").unwrap();
    fs::set_permissions(into.join("locked"), fs::Permissions::from_mode(0o444)).unwrap();
    fs::hard_link(into.join("locked"), into.join("other")).unwrap();
    Evil::new()
        .file("tree", "now a file")
        .file("file/inner", "now a directory")
        .file("locked", "new")
        .add(b'1', "twin", "locked", 0o644, b"")
        .add(b'1', "locked", "locked", 0o644, b"")
        .unpack(&into)
        .unwrap();
    assert_eq!(fs::read(into.join("tree")).unwrap(), b"now a file");
    assert_eq!(fs::read(into.join("file/inner")).unwrap(), b"now a directory");
    assert_eq!(fs::read(into.join("locked")).unwrap(), b"new");
    assert_eq!(fs::read(into.join("twin")).unwrap(), b"new");
    assert_eq!(fs::read(into.join("other")).unwrap(), b"old");
}

#[test]
fn names_may_be_long_and_strange_but_not_endless() {
    let (_dir, into) = place();
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    Evil::new()
        .add(b'L', "././@LongLink", "", 0, format!("{long}\0").as_bytes())
        .file("cut", "1")
        .add(b'x', "pax", "", 0, b"14 path=a\nb c\n")
        .file("cut", "2")
        .file("after", "3")
        .unpack(&into)
        .unwrap();
    assert_eq!(fs::read(into.join(&long)).unwrap(), b"1");
    assert_eq!(fs::read(into.join("a\nb c")).unwrap(), b"2");
    assert_eq!(fs::read(into.join("after")).unwrap(), b"3");
    let endless = vec![b'a'; 5000];
    Evil::new().add(b'L', "l", "", 0, &endless).file("cut", "4").unpack(&into).unwrap();
    assert!(!into.join("cut").exists());
    let huge = vec![b'a'; 2 << 20];
    let huge = Evil::new().add(b'L', "l", "", 0, &huge).file("cut", "4");
    let error = huge.unpack_within(&into, 1 << 30, 10).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
}

#[test]
fn bytes_and_names_are_bounded_and_halves_are_noticed() {
    let (_dir, into) = place();
    let large = || Evil::new().add(b'0', "large", "", 0o644, &[7; 5000]);
    let error = large().unpack_within(&into, 4000, 10).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    let many = Evil::new().file("a", "").file("b", "").file("c", "");
    let error = many.unpack_within(&into, 1 << 20, 2).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    let mut cut = large().0;
    cut.truncate(3000);
    let error = unpack_tar(Box::new(io::Cursor::new(cut)), &into, 1 << 20, 10).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn half_a_file_is_not_left() {
    let (_dir, into) = place();
    let large = "x".repeat(4000);
    let error = Evil::new().file("small", "s").file("large", &large).unpack_within(&into, 3000, 9);
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    assert!(!into.join("large").exists());
}
