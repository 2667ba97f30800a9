# shellcheck shell=bash
# Engines that come up side by side and are measured one after another, each alone. To be sourced, with `out` (a folder
# for logs) and `limit` (seconds for all of it) set:
#   engine NAME SCRIPT ARGUMENTS…   # begins to come up, as benchmarks/peers/barrier.py says
#   turns                           # waits until all are up, then lets one after the other measure; false if one failed
# Those that are up in time have their turn even if another is not. What still runs at the end is ended.
peers=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
declare -A pids
names=()

engine() {
  local name=$1; shift
  rm -f "/tmp/ready.$name" "/tmp/go.$name"
  setsid python3 "$peers/barrier.py" "$name" "$@" > "$out/$name.log" 2>&1 &
  pids[$name]=$!
  names+=("$name")
}

turns() {
  local name failed=0 by=$(( limit - 25 * ${#names[@]} ))
  for name in "${names[@]}"; do
    until [ -e "/tmp/ready.$name" ]; do
      kill -0 "${pids[$name]}" 2> /dev/null || { lost "$name" "ended before it was up"; failed=1; break; }
      [ "$SECONDS" -lt "$by" ] || { lost "$name" "was not up after $SECONDS s"; failed=1; break; }
      sleep 0.2
    done
  done
  for name in "${names[@]}"; do
    [ -z "${pids[$name]:-}" ] || measure "$name" || failed=1
  done
  return $failed
}

measure() {
  local name=$1 pid=${pids[$1]} since=$SECONDS
  touch "/tmp/go.$name"
  while kill -0 "$pid" 2> /dev/null; do
    [ "$SECONDS" -lt "$limit" ] || { lost "$name" "was still measuring after $SECONDS s"; return 1; }
    sleep 0.2
  done
  wait "$pid" || { lost "$name" "failed while it was measured"; return 1; }
  end "$name"
  echo "$name: measured from $since to $SECONDS s"
}

lost() {
  echo "$1 $2; the end of $out/$1.log:" >&2
  tail -n 15 "$out/$1.log" >&2
  end "$1"
}

end() { # an engine is a family of processes: each was started as the head of its own session
  [ -z "${pids[$1]:-}" ] || kill -- "-${pids[$1]}" 2> /dev/null
  unset "pids[$1]"
}

trap 'for name in "${!pids[@]}"; do end "$name"; done; for name in "${names[@]}"; do rm -f "/tmp/ready.$name" "/tmp/go.$name" "/tmp/barrier_$name.py"; done' EXIT
