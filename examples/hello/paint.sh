# Colours and sections for the jobs of this example, to be sourced.

# paint COLOUR TEXT: a line in colour.
paint() {
  case $1 in
    green) code=32 ;;
    yellow) code=33 ;;
    cyan) code=36 ;;
    *) code=0 ;;
  esac
  printf '\033[%sm%s\033[0m\n' "$code" "$2"
}

# section NAME HEADING … end_section NAME: what lies between can be folded in GitLab.
section() {
  printf 'section_start:%s:%s\r\033[0K\033[36;1m%s\033[0m\n' "$(date +%s)" "$1" "$2"
}

end_section() {
  printf 'section_end:%s:%s\r\033[0K' "$(date +%s)" "$1"
}
