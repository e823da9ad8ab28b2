//! When to look again, when to give up, when to ask for more; functions of jobs and time.
