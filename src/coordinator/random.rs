//! Tokens and other unguessable texts.

const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Gives random letters of the URL-safe base64 alphabet.
pub(super) fn letters(count: usize) -> String {
    let mut bytes = vec![0; count];
    getrandom::fill(&mut bytes).expect("the system gives random bytes");
    bytes.iter().map(|byte| char::from(LETTERS[usize::from(byte % 64)])).collect()
}

/// Gives 32 hex digits.
pub(super) fn hex() -> String {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system gives random bytes");
    format!("{:032x}", u128::from_be_bytes(bytes))
}

/// Gives a job token that looks like a JWT of the usual length.
pub(super) fn jwt() -> String {
    format!("glcbt-eyJraWQiOi{}.eyJ2ZXJzaW9uIjoi{}.{}", letters(96), letters(700), letters(342))
}
