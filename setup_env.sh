#!/bin/sh
# To be sourced: puts this checkout's src on PYTHONPATH, so that `import flash_experts` works without installing it.
#
#     source setup_env.sh     # bash, zsh; from another directory: source PATH/setup_env.sh
#     . ./setup_env.sh        # any POSIX shell
#
# Nothing else changes in your shell: no variable, no function, no option, not the directory. All work is done in a
# subshell, which prints the one command that the shell then runs. Sourcing it again changes nothing more.
#
# bash, zsh and ksh know which file they source. Other shells (dash, busybox) do not: there it is the file that the
# shell holds open (Linux), else $FLASH_EXPERTS_HOME, else the current directory.
eval "$(
  set +efu
  unset IFS CDPATH
  is_checkout() { [ -f "$1/setup_env.sh" ] && [ -f "$1/src/flash_experts/__init__.py" ]; }
  absolute() { command cd -P "$1" >/dev/null 2>&1 && command pwd -P; }
  find_open_file() { # sets file to the setup_env.sh that the shell opened last; this subshell is that shell's child
    while read -r key parent; do [ "$key" = PPid: ] && break; done </proc/self/status
    last=0 file=
    for link in /proc/"$parent"/fd/*; do
      target=$(command readlink "$link") number=${link##*/}
      case $target in */setup_env.sh) [ "$number" -gt "$last" ] && last=$number file=$target ;; esac
    done
  } 2>/dev/null

  is_sourced=''
  if [ -n "${ZSH_VERSION-}" ]; then
    setopt posix_builtins # `command cd`
    eval 'file=${(%):-%x}'
    case ${ZSH_EVAL_CONTEXT-} in *:file*) is_sourced=yes ;; esac
  elif [ -n "${BASH_VERSION-}" ]; then
    file=$BASH_SOURCE
  else
    case ${KSH_VERSION-} in *93*) eval 'file=${.sh.file}' ;; *) find_open_file ;; esac
  fi
  case $file in */*) home=${file%/*} ;; *) home=. ;; esac
  home=$(absolute "${home:-/}")
  is_checkout "$home" || home=$(absolute "${FLASH_EXPERTS_HOME:-.}")
  [ -n "${ZSH_VERSION-}" ] || [ "$0" -ef "$home/setup_env.sh" ] || is_sourced=yes

  stop() {
    printf 'setup_env.sh: %s\n' "$1" >&2
    [ "$is_sourced" ] && echo 'return 1' || echo 'exit 1'
    exit
  }
  is_checkout "$home" || stop "cannot find the checkout it belongs to: source it from there, or set FLASH_EXPERTS_HOME"
  [ "$is_sourced" ] || stop "to change your shell it must be sourced, not run:  . \"$home/setup_env.sh\""
  case $home in *:*) stop "$home has a colon in it, which separates folders in PYTHONPATH: move the checkout" ;; esac

  new=${PYTHONPATH-} src=$home/src
  case $new in
    "$src" | "$src":*) ;;
    '') new=$src ;;
    *)
      others=:$new:
      while case $others in *":$src:"*) ;; *) false ;; esac; do
        others=${others%%":$src:"*}:${others#*":$src:"}
      done
      others=${others#:}
      new=$src:${others%:}
      ;;
  esac
  quoted='' quote="'"
  while case $new in *"$quote"*) ;; *) false ;; esac; do
    quoted=$quoted${new%%"$quote"*}"'\\''" new=${new#*"$quote"}
  done
  printf "export PYTHONPATH='%s'\n" "$quoted$new"
)"
